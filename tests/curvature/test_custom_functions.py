"""Losses with an `autograd.Function` whose backward is wrong the second time, and losses with random curvature."""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import product
from typing import Any

import pytest
import torch
from searches import Point, certified, dense_hessian
from torch import Tensor, nn

from packsaddle import Verdict, certify, simulate
from packsaddle.curvature import Curvature
from packsaddle.curvature.custom_functions import custom_functions

Loss = Callable[[Any, Any], Tensor]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


class FusedCrossEntropy(torch.autograd.Function):
    """torch's cross entropy, whose gradient is computed in the forward pass, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        gradient = logits.softmax(1)
        gradient[torch.arange(len(labels)), labels] -= 1
        ctx.save_for_backward(gradient / len(labels))
        return nn.functional.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


class Concave(torch.autograd.Function):
    """-||x||^2 / 2, whose gradient is computed in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(-x)
        return -x.square().sum() / 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * ctx.saved_tensors[0].clone()


class Square(torch.autograd.Function):
    """x^2 with a backward that torch can differentiate; in float32 alone if it is told so."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, narrow: bool = False) -> Tensor:
        if narrow and x.dtype is torch.float64:
            raise TypeError("no kernel for float64")
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * grad, None


class Mapped(torch.autograd.Function):
    """x^2 under vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * ctx.saved_tensors[0] * grad


class Squared(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


class TorchsSquare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def fused(logits: Tensor, labels: Tensor) -> Tensor:
    return FusedCrossEntropy.apply(logits, labels)


def classifier(dtype: torch.dtype, *activations: nn.Module) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(0)
    layers = [layer for i, a in enumerate(activations) for layer in (nn.Linear(4 if i == 0 else 12, 12), a)]
    model = nn.Sequential(*layers, nn.Linear(12 if layers else 4, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=rng))
    x, labels = torch.randn(64, 4, generator=rng), torch.randint(3, (64,), generator=rng)
    return model.to(dtype), (x.to(dtype), labels)


def loss_by(cross_entropy: Callable[..., Tensor]) -> Loss:
    return lambda model, batch: (
        cross_entropy(model(batch[0]), batch[1]) + 1e-2 * sum(p.square().sum() for p in model.parameters())
    )


plainly = loss_by(nn.functional.cross_entropy)


def certificate(model: nn.Module, loss: Loss, batches: Any, **given: Any) -> Any:
    return certified(model, loss, batches, **{"epsilon": None, "hessian_lipschitz": 1e-2, **given})


@DTYPES
def test_a_minimum_under_a_fused_loss_is_no_saddle(dtype: torch.dtype) -> None:
    """Double backward without the fused part has negative curvature here, of the size of the residuals."""
    model, batch = classifier(dtype, nn.Tanh())
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = plainly(model, batch)
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    plain, by_fused = (certificate(model, f, [batch], epsilon=1e-2) for f in (plainly, loss_by(fused)))
    exact = float(torch.linalg.eigvalsh(dense_hessian(model, plainly, batch))[0])
    assert plain.verdict is by_fused.verdict is Verdict.SECOND_ORDER_STATIONARY
    assert (plain.hvp, by_fused.hvp) == ("double backward", "differences of gradients")
    assert by_fused.lambda_min_lower <= exact <= by_fused.lambda_min_upper
    assert "a custom autograd.Function, FusedCrossEntropy" in str(by_fused.hvp_reason)
    assert " its product of norm " in str(by_fused)


def concave_in_one(model: Any, batch: Tensor) -> Tensor:
    x = model.x
    return Concave.apply(x[:1]) + (torch.linspace(0.5, 1.5, 20)[1:] * x[1:].square()).sum() / 2


@DTYPES
def test_a_saddle_inside_a_function_is_found(dtype: torch.dtype) -> None:
    arguments: Any = (Point(torch.zeros(20, dtype=dtype)), concave_in_one, [torch.zeros(1)])
    found = certificate(*arguments, epsilon=1e-2, hessian_lipschitz=1.0)
    assert found.verdict is Verdict.SADDLE
    assert -1.001 <= found.lambda_min_upper < -0.1
    with pytest.raises(ValueError, match=r"hvp must be 'differences' or 'auto' for this loss: .*product .* Concave"):
        certificate(*arguments, epsilon=1e-2, hvp="double-backward")


def test_the_direction_of_the_verdict_is_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that has 1e-7 of x_0, whose product hides what is wrong along it; the lowest direction is x_0's."""

    def start(self: Curvature, generator: Any) -> Tensor:
        return torch.tensor([1e-7, *[1.0] * 19], dtype=torch.float64)

    monkeypatch.setattr(Curvature, "random_vector", start)
    told: list[int] = []
    settings: dict[str, Any] = {"epsilon": 1e-2, "hessian_lipschitz": 1e-7}
    model = Point(torch.zeros(20))
    found = certify(model, concave_in_one, [torch.zeros(1)], **settings, progress=lambda b: told.append(b.products))
    assert found.hvp == "differences of gradients"
    assert told.index(1, 1) > 1  # the search began again after several products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kinks_hide_no_wrong_product(dtype: torch.dtype) -> None:
    """Differences of a ReLU network in float32, or in 16 bits, are too coarse; a copy in float64 decides."""
    model, batch = classifier(dtype, nn.ReLU(), nn.ReLU())
    found = certificate(model, loss_by(fused), [batch], max_hvps=3)
    assert found.hvp == "differences of gradients"
    assert str(found.hvp_reason).startswith("in float64 its product of norm ")


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU], ids=lambda a: a.__name__)
@DTYPES
def test_a_function_that_is_right_twice_is_trusted(dtype: torch.dtype, activation: type[nn.Module]) -> None:
    found = {}
    for square in (Squared, TorchsSquare):
        model, batch = classifier(dtype, activation(), square(), activation())
        found[square] = certificate(model, plainly, [batch], hvp="double-backward")
        assert custom_functions(model(batch[0]).sum()) == ({"Square"} if square is Squared else set())
    own, torchs = found.values()
    assert own.verdict is torchs.verdict
    assert own.lambda_min_upper == pytest.approx(torchs.lambda_min_upper, rel=1e-3)
    assert own.backward_passes > torchs.backward_passes


def test_a_loss_without_a_copy_in_double_precision_is_not_trusted() -> None:
    """In 16 bits, where differences are too coarse for every processor's rounding."""
    model, batch = classifier(torch.bfloat16, nn.ReLU(), nn.ReLU())

    def loss(model: Any, batch: Any) -> Tensor:
        return Square.apply(model(batch[0]), True).mean()

    found = certificate(model, loss, [batch], max_hvps=3)
    assert found.hvp == "differences of gradients"
    assert "in float64 (TypeError); the loss has a custom autograd.Function, Square" in str(found.hvp_reason)


def test_workers_decide_alike() -> None:
    """The function is in one worker's batches, and one has no batch; the verdict is that of the union."""
    _, (x, labels) = classifier(torch.float32, nn.ReLU())

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor, bool]) -> Tensor:
        return loss_by(fused if batch[2] else nn.functional.cross_entropy)(model, batch)

    def work(rank: int) -> Any:
        batches: list[Any] = [[(x[:32], labels[:32], False)], [(x[32:], labels[32:], True)], []]
        own, _ = classifier(torch.float32, nn.ReLU())
        return certificate(own, loss, batches[rank], epsilon=1.0, always=True, sample=False)

    found = simulate(work, 3)
    assert {c.hvp for c in found} == {"differences of gradients"}
    assert len({(c.verdict, c.hvps, c.lambda_min_upper, c.lambda_min_lower) for c in found}) == 1
    assert "FusedCrossEntropy" in str(found[1].hvp_reason)
    assert "of another worker" in str(found[0].hvp_reason)


def test_random_curvature_is_refused_where_the_loss_is_zero() -> None:
    """By differences what is random counts as their error."""
    model = nn.Linear(20, 1, bias=False)
    nn.init.zeros_(model.weight)
    for times, hvp in product((1.0, 1e-2), ("auto", "double-backward", "differences")):

        def loss(model: Any, batch: Tensor, times: float = times) -> Tensor:
            return ((1 + times * torch.randn(20)) * model.weight.square()).sum()

        refused = pytest.raises(ValueError, match="loss_fn gave two Hessian-vector products")
        with nullcontext() if hvp == "differences" else refused:
            found = certificate(model, loss, [torch.zeros(1)], epsilon=1e-2, hessian_lipschitz=1e-4, hvp=hvp)
            assert found.verdict is Verdict.UNDECIDED or found.hvp_error > 0


def test_functions_of_torch_are_not_custom() -> None:
    x = torch.ones(3, 3, requires_grad=True)
    layer = nn.Linear(3, 3)
    layer.register_full_backward_hook(lambda *_: None)
    own = layer(torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)).sum()
    assert custom_functions(own) == set()
    assert custom_functions(own + Square.apply(x).sum() + Concave.apply(x)) == {"Square", "Concave"}
    operator = torch.library.custom_op(
        "packsaddle_tests::identity", torch.clone, mutates_args=(), schema="(Tensor x) -> Tensor"
    )
    operator.register_autograd(lambda ctx, grad: grad)
    assert len(custom_functions(operator(x))) == 1
    assert custom_functions(torch.vmap(Mapped.apply)(x).sum()) == {"VmappedMapped"}
