"""Hessian-vector products by differences of gradients: their errors, and certificates, against dense Hessians."""

import math
import re
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from searches import Point, certified, dense_hessian, derivatives
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from packsaddle import Verdict, simulate
from packsaddle.curvature.differences import Differences
from packsaddle.curvature.double_backward import DoubleBackward, choose_products

Batch = tuple[Tensor, Tensor]


def network(seed: int, dtype: torch.dtype, widths: tuple[int, ...] = (3, 4, 2)) -> tuple[nn.Module, Batch]:
    """A tanh network far from its minimum, with a batch of 16; 26 parameters."""
    rng = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    model = nn.Sequential(*layers[:-1]).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=rng))
    x, y = torch.randn(16, widths[0], generator=rng), 2 * torch.randn(16, widths[-1], generator=rng)
    return model, (x.to(dtype), y.to(dtype))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def under_autocast(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        output = model(batch[0])
    return nn.functional.mse_loss(output.float(), batch[1])


KINDS = {
    "float64": (torch.float64, loss_fn, 1e-8),
    "float32": (torch.float32, loss_fn, 2e-3),
    "bfloat16": (torch.bfloat16, loss_fn, 1.0),
    "autocast": (torch.float32, under_autocast, 2.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_products_error_is_at_most_what_is_measured(kind: str) -> None:
    """Along random directions and along the extreme eigenvectors; and it is small enough to be of use."""
    dtype, loss, useful = KINDS[kind]
    for seed in range(5):
        model, batch = network(seed, dtype)
        before = [p.clone() for p in model.parameters()]
        hessian = dense_hessian(model, loss_fn, batch)
        eigenvalues, vectors = torch.linalg.eigh(hessian)
        differences = Differences(derivatives(model, loss, [batch]))
        random = torch.randn(len(hessian), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for v in (random / random.norm(), vectors[:, 0], vectors[:, -1]):
            product, error = differences.checked(v)
            assert float((product - hessian @ v).norm()) <= error <= differences.error
        assert differences.error <= useful * float(eigenvalues.abs().max())
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.slow
def test_both_bounds_are_covered() -> None:
    """From above always; from below but for the failure probability over the start: for each kind of products, and for
    all together, which have networks of their own."""
    delta, runs, kinds = 0.05, 8, ("float32", "bfloat16", "autocast")
    failures = [uncovered(kind, range(i * runs, (i + 1) * runs), 100, delta) for i, kind in enumerate(kinds, 1)]
    for below, above in failures:
        assert max(below, above) <= allowed(runs, delta)
    for either in zip(*failures, strict=True):
        assert sum(either) <= allowed(runs * len(kinds), delta)


def allowed(runs: int, delta: float) -> float:
    """Failures of so many runs at a failure probability of delta, with three standard deviations."""
    return runs * delta + 3 * math.sqrt(runs * delta * (1 - delta))


def uncovered(kind: str, seeds: range, products: int, delta: float) -> tuple[int, int]:
    """How often lambda_min was below its lower bound, and lambda_max above its upper one."""
    dtype, loss, _ = KINDS[kind]
    failures, above = 0, 0
    for seed in seeds:
        model, batch = network(seed, dtype)
        exact = torch.linalg.eigvalsh(dense_hessian(model, loss_fn, batch))
        smallest, largest, rounding = float(exact[0]), float(exact[-1]), 1e-12 * float(exact.abs().max())
        certificate = certified(
            model,
            loss,
            [batch],
            hessian_lipschitz=smallest**2 / 1e3,  # a threshold that takes all products
            failure_probability=delta,
            max_hvps=products,
            hvp="differences",
            seed=seed,
        )
        assert certificate.lambda_min_upper >= smallest - rounding, seed
        failures += certificate.lambda_min_lower > smallest + rounding
        assert certificate.lambda_max_lower <= largest + rounding, seed
        above += certificate.lambda_max_upper < largest - rounding
    return failures, above


def test_the_error_at_kinks_is_measured() -> None:
    """f = |x_1 - s| for s within h of x_1 = 0: the gradient jumps by 2, and products are wrong by 1 / h."""

    def kinked(model: Any, batch: Tensor) -> Tensor:
        x: Tensor = model.x
        return (x[0] - 1e-7).abs() + x.square().sum() / 2 + (x[1] ** 4) / 24

    settings: dict[str, Any] = {"epsilon": 2.0, "hessian_lipschitz": 1e-9, "hvp": "differences", "max_hvps": 2}
    certificate = certified(Point(torch.zeros(2, dtype=torch.float64)), kinked, [torch.zeros(1)], **settings)
    assert certificate.lambda_min_lower <= 1.0 <= certificate.lambda_min_upper


def test_differences_in_double_precision_are_double_backward_at_kinks() -> None:
    """ReLU's kinks are further from a point than the steps that double precision allows; a first step crosses many."""
    rng = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
        model[0].bias.mul_(1e-2)  # type: ignore[operator, union-attr]
    x = 1e-3 * torch.randn(256, 6, generator=rng, dtype=torch.float64)
    batch, settings = (x, torch.ones_like(x)), {"epsilon": 10.0, "hessian_lipschitz": 1e-4}
    exact, differences = (
        certified(model, loss_fn, [batch], hvp=hvp, **settings) for hvp in ("double-backward", "differences")
    )
    assert differences.verdict is exact.verdict
    assert differences.hvp_error < 1e-6
    assert differences.lambda_min_upper == pytest.approx(exact.lambda_min_upper, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_short_steps_are_taken_where_the_loss_rounds(dtype: torch.dtype) -> None:
    """A loss of fewer bits than its parameters is a staircase: a step within one stair sees none of its curvature."""
    model = Point(torch.linspace(0.5, 1.0, 12, dtype=torch.float64))

    def rounded(model: Any, batch: Tensor) -> Tensor:
        x: Tensor = model.x
        return x.to(dtype).square().mean().double() * 5 - 0.05 * x.square().mean()

    exact = (10 - 0.1) / 12
    found = certified(model, rounded, [torch.zeros(1)], epsilon=10.0, hvp="differences")
    assert found.verdict is not Verdict.SADDLE
    assert found.lambda_min_lower <= exact <= found.lambda_max_upper
    assert found.lambda_max_lower <= exact <= found.lambda_min_upper + 2 * found.hvp_error


def test_examples_read_in_single_precision_do_not_shorten_a_loss_in_double() -> None:
    """Data that become float64 as they are read, and constants of other dtypes, are no rounding of the parameters."""

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            yield (torch.ones(4, 3) / 3).double()

    def loss(model: Any, batch: Tensor) -> Tensor:
        x: Tensor = model.x
        return (batch * x.square()).mean() * torch.ones(1, dtype=torch.float32).item()

    at = Point(torch.zeros(3, dtype=torch.float64))
    assert derivatives(at, loss, Batches()).precision == torch.finfo(torch.float64).eps


@pytest.mark.parametrize("w", [8.0, 100.0])
def test_a_sharp_valley_is_measured_from_far_beyond_it(w: float) -> None:
    """f = -cos(w u^T x) / w^2 for a unit u: H = u u^T. Of a flat direction the best step is many periods of u's long,
    and products of u differ little there, as all are nearly 0."""
    u = nn.functional.normalize(torch.cat([torch.zeros(1), torch.ones(199)]), dim=0)
    flat = torch.eye(200, dtype=torch.float64)[0]  # across u

    def valley(model: Any, batch: Tensor) -> Tensor:
        x: Tensor = model.x
        return -torch.cos(w * (u @ x)) / w**2 + 1e-6 * x[0] ** 2

    far = Point(100.0 * flat.float())  # for a long first step
    differences = Differences(derivatives(far, valley, [torch.zeros(1)]))
    differences.checked(flat)
    assert differences.step > 1.0 / w
    product, error = differences.checked(u.double())
    assert float((product - u.double()).norm()) <= error < 1e-3


class Attention(nn.Module):
    """A block of attention, by torch's choice of a kernel or always by flash attention."""

    def __init__(self, *, flash: bool = False) -> None:
        super().__init__()
        self.kernel = partial(sdpa_kernel, SDPBackend.FLASH_ATTENTION) if flash else nullcontext
        rng = torch.Generator().manual_seed(0)
        self.inward, self.outward = nn.Linear(6, 18), nn.Linear(6, 6)
        with torch.no_grad():
            for p in self.parameters():
                p.normal_(0, 0.5, generator=rng)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 2, 3).transpose(1, 2) for t in self.inward(x).chunk(3, -1))
        with self.kernel():
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.outward(mixed.transpose(1, 2).flatten(2))


def test_fused_attention_is_certified_by_differences_if_a_network_insists() -> None:
    """Flash attention has no double backward; torch's choice of a kernel is replaced by one that has, and agrees."""
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 5, 6, generator=rng), torch.randn(4, 5, 6, generator=rng)
    fused, plain = (certified(Attention(flash=flash), loss_fn, [(x, y)], seed=2) for flash in (True, False))
    assert (fused.hvp, plain.hvp) == ("differences of gradients", "double backward")
    assert fused.verdict == plain.verdict == Verdict.SADDLE
    assert fused.lambda_min_upper - fused.hvp_error == pytest.approx(plain.lambda_min_upper, abs=2 * fused.hvp_error)
    text = str(fused)
    assert re.search(r"products in float32 by differences of gradients \(h = .*; off by .*, in both bounds;", text)
    assert "no double backward: derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is" in text
    assert plain.hvp_step is None
    assert "by double backward, " in str(plain)
    with pytest.raises(RuntimeError, match="is not implemented"):
        certified(Attention(flash=True), loss_fn, [(x, y)], hvp="double-backward")


@pytest.mark.slow
def test_compiled_networks_are_certified_by_differences() -> None:
    model, batch = network(0, torch.float32)
    plain = certified(model, loss_fn, [batch])
    certificate = certified(torch.compile(model, backend="aot_eager"), loss_fn, [batch])
    assert certificate.verdict == plain.verdict == Verdict.SADDLE
    assert "does not currently support double backward" in str(certificate.hvp_reason)
    assert certificate.lambda_min_upper == pytest.approx(plain.lambda_min_upper, abs=2 * certificate.hvp_error)


def test_checkpointed_activations_change_no_product() -> None:
    model, batch = network(5, torch.float64)

    def checkpointed(model: nn.Module, batch: Batch) -> Tensor:
        inner = checkpoint(model[:2], batch[0], use_reentrant=False)
        return nn.functional.mse_loss(model[2](inner), batch[1])

    assert isinstance(choose_products(derivatives(model, checkpointed, [batch]), "auto"), DoubleBackward)
    plain, stored = certified(model, loss_fn, [batch]), certified(model, checkpointed, [batch])
    assert stored.lambda_min_upper == plain.lambda_min_upper
    assert stored.lambda_min_lower == plain.lambda_min_lower


def test_rho_by_differences_is_rho_by_double_backward() -> None:
    for dtype, within in ((torch.float64, 1e-3), (torch.float32, 0.05)):
        model, batch = network(3, dtype)
        v = torch.randn(26, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        curvature = derivatives(model, loss_fn, [batch])
        differences = Differences(curvature)
        differences.checked(v / v.norm())
        exact = choose_products(curvature, "double-backward").change(v / v.norm())
        assert differences.change(v / v.norm()) == pytest.approx(exact, rel=within)


def test_workers_choose_alike_and_certify_the_union() -> None:
    """A batch without double backward on one worker makes all of them take differences; the last has no batches."""

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, bool]) -> Tensor:
        if batch[2]:
            raise_twice = _Once.apply(model(batch[0]))
            return nn.functional.mse_loss(raise_twice, batch[1])
        return loss_fn(model, batch[:2])

    def worker(rank: int) -> Any:
        model, (x, y) = network(0, torch.float64)
        mine: list[Any] = [[(x[:10], y[:10], False)], [(x[10:], y[10:], True)], []][rank]
        return certified(model, loss, mine)

    model, batch = network(0, torch.float64)
    alone = certified(model, loss_fn, [batch], hvp="differences")
    found = simulate(worker, 3)
    assert [c.hvp_reason for c in found[::2]] == ["another worker's batch has no double backward"] * 2
    assert found[1].hvp_reason == "a function is marked once_differentiable"
    for certificate in found:
        assert (certificate.verdict, certificate.hvps) == (alone.verdict, alone.hvps)
        assert certificate.lambda_min_upper == pytest.approx(alone.lambda_min_upper, abs=2 * alone.hvp_error)


class _Once(torch.autograd.Function):
    """The identity, whose derivative cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


class Rounded:
    """Gradients of a quadratic of d coordinates, each with a rounding error that is drawn anew."""

    precision = 2.0**-23

    def __init__(self, d: int, seed: int) -> None:
        self.d, self.products, self._rng = d, 0, torch.Generator().manual_seed(seed)

    def size_of_parameters(self) -> float:
        return 1.0

    def norm(self, v: Tensor) -> float:
        return float(v.norm())

    def gradient_at(self, v: Tensor, distance: float) -> Tensor:
        return distance * v + 1e-6 * torch.randn(self.d, generator=self._rng, dtype=torch.float64)


@pytest.mark.parametrize(("d", "most"), [(2, 0.006), (5, 0.0)])
def test_the_rounding_of_few_coordinates_is_covered(d: int, most: float) -> None:
    """One difference of two rounding errors says little of a third one, if they are of few numbers."""
    missed, v = 0, torch.ones(d, dtype=torch.float64) / math.sqrt(d)
    for seed in range(2000):
        product, error = Differences(Rounded(d, seed)).checked(v)  # type: ignore[arg-type]
        missed += float((product - v).norm()) > error
    assert missed <= 2000 * most
