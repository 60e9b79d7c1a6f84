"""Certificates against dense Hessians, on problems with known saddles, and over processes."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from searches import Point, arguments, certified, dense_hessian, derivatives
from torch import Tensor, nn

from lab.paper.problems import (
    Cosine,
    CurvedValley,
    DoubleWells,
    OrthogonalTensor,
    Problem,
    QuadraticQuartic,
    RankOnePCA,
)
from packsaddle import Verdict, certify, simulate
from packsaddle.comm.group import resolve
from packsaddle.curvature import Progress
from packsaddle.curvature.mean_loss import NotFiniteError, batch_size
from packsaddle.integrations.callbacks import certificate_line

STATIONARY = "second-order stationary"
EXACT, MEASURED = ("verdict", "examples", "hvps"), ("grad_norm", "lambda_min_upper", "loss")


class Bowl:
    """A convex quadratic with 200 curvatures from 0.01 to 2, so that a couple of products cannot exclude a saddle."""

    def __call__(self, x: Tensor) -> Tensor:
        return (torch.linspace(0.01, 2, len(x), dtype=x.dtype) * x**2).sum() / 2


def certify_point(problem: Callable[[Tensor], Tensor], x: Tensor, **changes: Any) -> Any:
    given = {"epsilon": 1e-2, "hessian_lipschitz": 1.0, "seed": 3, **changes}
    return certified(Point(x), lambda m, batch: problem(m.x), [torch.zeros(1)], **given)


@pytest.mark.parametrize(
    "problem", [DoubleWells(5), OrthogonalTensor(5), QuadraticQuartic(4), CurvedValley()], ids=repr
)
def test_known_saddles_and_minima(problem: Problem) -> None:
    for point in problem.critical_points():
        certificate = certify_point(problem, point.x)
        saddle = point.lambda_min < -math.sqrt(1e-2)
        assert certificate.verdict == (Verdict.SADDLE if saddle else Verdict.SECOND_ORDER_STATIONARY)
        assert certificate.lambda_min_lower <= point.lambda_min + 1e-12
        assert certificate.lambda_min_upper >= point.lambda_min - 1e-12
        if saddle:
            v = certificate.escape_direction
            assert certificate.escape_loss < certificate.loss == pytest.approx(float(problem(point.x)))
            assert certificate.escape_loss == float(problem(point.x + certificate.escape_distance * v))
            assert certificate.escape_bend > 0
            assert float(v.norm()) == pytest.approx(1.0)
            assert float(problem(point.x + 0.05 * v)) < float(problem(point.x))
            assert float(problem(point.x - 0.05 * v)) < float(problem(point.x))


def test_a_verdict_is_never_stronger_than_its_evidence() -> None:
    problem, n = DoubleWells(200), 200
    minimum = torch.ones(n, dtype=torch.float64)
    settings = {"epsilon": 0.1, "hessian_lipschitz": 0.1}
    bowl, zero = Bowl(), torch.zeros(n, dtype=torch.float64)
    undecided = certify_point(bowl, zero, max_hvps=2, **settings)
    assert undecided.verdict == Verdict.UNDECIDED
    assert "more products may settle it: the bounds are" in str(undecided)
    settled = certify_point(bowl, zero, **settings)
    assert settled.verdict == Verdict.SECOND_ORDER_STATIONARY
    assert 2 < settled.hvps < 60
    assert certify_point(problem, 0.9 * minimum, **settings).verdict == Verdict.GRADIENT_TOO_LARGE
    one_flat = minimum.clone()
    one_flat[7] = 0.0
    assert certify_point(problem, one_flat, max_hvps=1, **settings).verdict == Verdict.UNDECIDED
    assert certify_point(problem, one_flat, **settings).verdict == Verdict.SADDLE


def test_progress_tells_bounds_that_close_in() -> None:
    """Each product takes two backward passes, and the gradient one."""
    heard: list[Progress] = []
    at = torch.zeros(200, dtype=torch.float64)
    found = certify_point(Bowl(), at, epsilon=0.1, hessian_lipschitz=0.1, progress=heard.append)
    assert found.backward_passes == 1 + 2 * found.hvps
    assert list(dict.fromkeys(p.phase for p in heard)) == ["loss and gradient", "bounds on all 1 examples"]
    told = [p for i, p in enumerate(heard[1:]) if p.products > heard[i].products]
    assert [b.products for b in told] == list(range(1, len(told) + 1))
    assert all(b.lambda_min[0] <= 0.01 <= b.lambda_min[1] for b in told)
    assert all(later.lambda_min[1] <= earlier.lambda_min[1] + 1e-9 for earlier, later in pairwise(told))
    assert {b.threshold for b in told} == {-0.1}
    last = told[-1]
    assert (last.done, last.expected) == (found.hvps, 200)
    text = str(last)
    assert text.startswith(f"bounds on all 1 examples, product {last.products}: lambda_min in [")
    assert last.left is not None
    assert text.endswith(f"at most {last.left:.0f} s left")


def test_a_kink_is_told_from_a_saddle() -> None:
    """f = |x_1| - x_1^2 / 2 near 0: the Hessian says saddle, finite steps say otherwise, up to |x_1| = 2."""

    def kinked(x: Tensor) -> Tensor:
        return x[0].abs() - x[0] ** 2 / 2 + x[1:].square().sum() / 2

    at = torch.tensor([1e-9, 0.0, 0.0], dtype=torch.float64)
    certificate = certify_point(kinked, at, epsilon=2.0, hessian_lipschitz=0.1)
    assert certificate.verdict == Verdict.SADDLE
    assert certificate.escape_bend < 0
    assert "kinks? finite steps see no negative curvature" in str(certificate)


@pytest.mark.parametrize("slope", [0.0, 0.05, -0.2])
def test_the_fall_is_what_the_lipschitz_constant_guarantees(slope: float) -> None:
    """|lambda|^3 / (10 rho^2) at least, with |lambda| = rho = 1 and any slope added."""
    problem = Cosine(3)
    at = problem.critical_points()[1].x
    certificate = certify_point(lambda x: problem(x) + slope * x[0], at, epsilon=0.5, hessian_lipschitz=1.0)
    assert certificate.verdict == Verdict.SADDLE
    assert certificate.escape_bend >= 1 / 10
    assert certificate.slope * certificate.escape_distance <= 1e-12


def test_derivatives_that_are_not_finite_are_told() -> None:
    for function in (lambda x: x.norm(), lambda x: x.abs().sqrt().sum() + 1):
        with pytest.raises(NotFiniteError, match="a derivative of the loss is not finite"):
            certify_point(function, torch.zeros(3, dtype=torch.float64))


def test_workers_must_agree_on_the_model() -> None:
    """Other parameters are refused; statistics of batch normalisation and starts are rank 0's meanwhile."""

    def worker(rank: int, spoil: bool, freeze: bool = False) -> Any:
        model, batches = network()
        model[0].weight.requires_grad_(not freeze)
        if rank:
            model[1].running_mean.add_(1.0)
            model[0].weight.data.add_(1e-3 if spoil else 0.0)
        certificate = certified(model, loss_fn, batches[rank::2], seed=rank)
        return certificate.loss, certificate.lambda_min_upper, float(model[1].running_mean.sum())

    whole = certified(*network_and_loss())
    first, second = simulate(lambda rank: worker(rank, False), 2)
    assert first[:2] == second[:2]
    assert first[0] == pytest.approx(whole.loss, rel=1e-12)
    assert (first[2], second[2]) == (0.0, 6.0)
    for freeze in (False, True):
        with pytest.raises(ValueError, match="model has other parameters on some workers than on rank 0"):
            simulate(lambda rank, freeze=freeze: worker(rank, True, freeze), 2)


def network(seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network with dropout and batch normalisation, a frozen layer, and batches of unequal sizes."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Linear(5, 2)
    )
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.5, generator=rng)
    model[4].bias.requires_grad_(False)
    data = torch.randn(30, 4, generator=rng, dtype=torch.float64)
    target = torch.randn(30, 2, generator=rng, dtype=torch.float64)
    return model, [(data[a:b], target[a:b]) for a, b in ((0, 7), (7, 19), (19, 30))]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def network_and_loss() -> tuple[nn.Module, Callable[..., Tensor], list[tuple[Tensor, Tensor]]]:
    """The first arguments of a certificate."""
    model, batches = network()
    return model, loss_fn, batches


def test_products_are_the_dense_hessian() -> None:
    """Unequal batches are weighted by their examples; frozen parameters are left out; modes are restored."""
    model, batches = network()
    curvature = derivatives(model.train(), loss_fn, batches)
    assert all(m.training for m in model.modules())
    h = torch.stack([curvature.hessian_vector(e) for e in torch.eye(curvature.d, dtype=torch.float64)])
    whole = tuple(torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.allclose(h, dense_hessian(model, loss_fn, whole), atol=1e-12)
    certificate = certified(model, loss_fn, batches, hessian_lipschitz=1e-9, max_hvps=1000)
    exact = float(torch.linalg.eigvalsh(h)[0])
    assert certificate.lambda_min_lower <= exact <= certificate.lambda_min_upper + 1e-12
    before = [p.clone() for p in model.parameters()]
    curvature.loss_at(certificate.escape_direction, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def certify_share() -> dict[str, Any]:
    """Certify the network on this worker's share of the batches."""
    group, (model, batches) = resolve(None), network()
    certificate = certified(model, loss_fn, batches[group.rank :: group.size], seed=5)
    return {name: getattr(certificate, name) for name in (*EXACT, *MEASURED)}


def test_workers_certify_the_union(gloo: Callable[..., list[Any]]) -> None:
    """The fourth has no batches."""
    alone = certify_share()
    for many in (*gloo(certify_share, 4), *simulate(lambda rank: certify_share(), 4)):
        assert [many[name] for name in EXACT] == [alone[name] for name in EXACT]
        for name in MEASURED:
            assert many[name] == pytest.approx(alone[name], rel=1e-9)


def test_a_fresh_start_is_shared_by_all_workers() -> None:
    def worker(rank: int) -> list[float]:
        settings = arguments(hessian_lipschitz=1.0, max_hvps=3)
        return [certify(*network_and_loss(), **settings, progress=False).lambda_min_upper for _ in range(2)]

    first, second = simulate(worker, 2)
    assert first == second
    assert first[0] != first[1]  # and fresh for every certificate


def test_what_is_not_a_function_is_refused() -> None:
    """The options of a search are in test_options.py."""
    model, batches = network()

    def random(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return loss_fn(m, (b[0] + torch.rand(1), b[1]))

    calls: dict[str, Callable[[], object]] = {
        "loss_fn gave two values for the same parameters and batches": lambda: certified(model, random, batches),
        "batches is empty on every worker": lambda: certified(model, loss_fn, []),
        "pass batches that can be read twice": lambda: certified(model, loss_fn, iter(batches)),
        "no trainable parameters": lambda: certified(nn.Tanh(), loss_fn, batches),
        "epsilon must .*, got 0.0": lambda: certified(model, loss_fn, batches, epsilon=0.0),
        "hessian_lipschitz must .*, got -1.0": lambda: certified(model, loss_fn, batches, hessian_lipschitz=-1.0),
        "sample_of must .*, got 0": lambda: certified(model, loss_fn, batches, sample_of=0),
        "lr must be finite and not negative": lambda: certify_point(Bowl(), torch.zeros(5)).escape_steps(math.nan),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_one_workers_trouble_stops_all() -> None:
    def worker(rank: int) -> str:
        model, batches = network()
        mine: Any = iter(batches[:1]) if rank else batches[1:]
        with pytest.raises(ValueError, match="loss_fn gave two values") as caught:
            certify(model, loss_fn, mine, epsilon=1.0)
        return str(caught.value)

    assert len(set(simulate(worker, 2))) == 1


def test_a_worker_whose_batch_is_empty_has_none() -> None:
    """As `data[rank::workers].split(64)` gives where there are few examples; the mean loss of no examples is NaN."""

    def worker(rank: int) -> Any:
        model, batches = network()
        return certified(model, loss_fn, [(batches[0][0][:0], batches[0][1][:0])] if rank else batches, epsilon=1.0)

    alone = certified(*network_and_loss(), epsilon=1.0)
    for found in simulate(worker, 2):
        assert (found.verdict, found.examples, found.loss) == (alone.verdict, alone.examples, alone.loss)
        assert found.lambda_min_upper == pytest.approx(alone.lambda_min_upper, rel=1e-6)


def test_a_loss_may_have_derivatives_in_it() -> None:
    """f = x^4 / 4 + ||grad of (w . x^2) by x||^2 / 2 with a graph of its own, against f without: 2 x, squared."""

    def penalised(model: Any, w: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad((w * model.x**2).sum(), model.x, create_graph=True)
        return model.x.pow(4).sum() / 4 - slope.square().sum() / 8

    def plain(model: Any, w: Tensor) -> Tensor:
        return model.x.pow(4).sum() / 4 - (2 * w * model.x).square().sum() / 8

    weights = [torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)]
    for x in (torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)):
        first, second = (certified(Point(x), f, weights, epsilon=1e-2) for f in (penalised, plain))
        assert first.verdict is second.verdict
        assert first.loss == pytest.approx(second.loss, abs=1e-12)
        assert first.grad_norm == pytest.approx(second.grad_norm, abs=1e-12)
        assert first.lambda_min_upper == pytest.approx(second.lambda_min_upper, abs=1e-9)


def test_the_random_stream_is_left_alone() -> None:
    """A DataLoader draws a seed from torch's generator at each pass."""
    model, batches = network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batches[1]), batch_size=4)
    before = torch.get_rng_state()
    certified(model, loss_fn, loader)
    assert torch.equal(torch.get_rng_state(), before)
    list(loader)
    assert not torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_a_samples_gradient_norm_has_its_error() -> None:
    """A linear model's gradient is a mean of independent vectors: the standard error covers the true one, and its
    square is right on average over samples."""
    rng = torch.Generator().manual_seed(0)
    population = torch.randn(4096, 5, generator=rng, dtype=torch.float64)
    errors, squares = [], []
    for seed in range(50):
        order = torch.randperm(4096, generator=torch.Generator().manual_seed(seed))[:512]
        batches = list(population[order].split(17))  # the last one is shorter
        model = Point(torch.zeros(5, dtype=torch.float64))
        settings = arguments(epsilon=1e-9, hessian_lipschitz=1e-3, sample_of=4096)  # no search
        certificate = certify(model, lambda m, batch: (batch @ m.x).mean(), batches, **settings)
        errors.append(certificate.grad_norm_error)
        squares.append(float((population[order].mean(0) - population.mean(0)).square().sum()))
    assert sum(e**2 for e in errors) == pytest.approx(sum(squares), rel=0.2)
    assert "512 examples, a sample of 4,096" in str(certificate)
    assert "(standard error" in str(certificate)
    alone = certify(model, lambda m, batch: (batch @ m.x).mean(), batches, epsilon=1e-9)
    assert alone.grad_norm_error is None
    with pytest.raises(ValueError, match="sample_of must be at least the 512 examples given, got 511"):
        certify(model, lambda m, batch: (batch @ m.x).mean(), batches, epsilon=10.0, sample_of=511)


def test_a_certificate_in_little_memory() -> None:
    """With three vectors in memory: the same verdict and direction, and the quotient and residual are measured."""
    problem = RankOnePCA(tuple(torch.linspace(1.0, 0.1, 60).tolist()))
    saddle = problem.critical_points()[8].x
    settings = {"epsilon": 0.03, "hessian_lipschitz": 0.1}
    whole, lean = (certify_point(problem, saddle, **settings, memory_limit=limit) for limit in (2**20, 0))
    assert whole.verdict == lean.verdict == Verdict.SADDLE
    assert lean.lambda_min_upper == pytest.approx(whole.lambda_min_upper, abs=1e-9)
    assert lean.residual == pytest.approx(whole.residual, abs=1e-6)
    assert lean.hvps > whole.hvps


def test_a_better_direction_for_more_products() -> None:
    problem = RankOnePCA(tuple(torch.linspace(1.0, 0.1, 60).tolist()))
    saddle = problem.critical_points()[20].x
    settings = {"epsilon": 0.1, "hessian_lipschitz": 0.1}
    quick, careful = (certify_point(problem, saddle, **settings, tolerance=t) for t in (math.inf, 1e-3))
    assert quick.verdict == careful.verdict == Verdict.SADDLE
    assert careful.residual <= 1e-3 * abs(careful.lambda_min_upper) < quick.residual
    assert careful.hvps > quick.hvps
    assert careful.lambda_min_upper == pytest.approx(problem.critical_points()[20].lambda_min, abs=1e-3)
    # The first product is taken twice, which max_hvps does not count.
    limited = certify_point(problem, saddle, **settings, tolerance=1e-12, max_hvps=quick.hvps)
    assert (limited.verdict, limited.hvps) == (Verdict.SADDLE, quick.hvps + 1)


def test_batch_sizes() -> None:
    for batch in (torch.zeros(3, 2), [torch.zeros(3), 1], {"x": (torch.zeros(3, 1),)}):
        assert batch_size(batch) == 3
    with pytest.raises(ValueError, match="a batch must be a tensor, or a list, tuple or dict"):
        batch_size("text")


class Ridge:
    """f = -c x_0^2 / 2 + (x_1^2 + x_2^2) / 2: curvature -c at 0."""

    def __init__(self, c: float) -> None:
        self.c = c

    def __call__(self, x: Tensor) -> Tensor:
        return -self.c * x[0] ** 2 / 2 + x[1:].square().sum() / 2


def test_a_plateau_that_passes_is_told_of() -> None:
    """Curvature -0.01 at epsilon = 1e-2 is a saddle for rho below 0.01, and passes for 1; eta = 0.5 takes 462 steps."""
    certificate = certify_point(Ridge(0.01), torch.zeros(3).double())
    assert certificate.verdict == Verdict.SECOND_ORDER_STATIONARY
    assert certificate.saddle_below_rho == pytest.approx(0.01, rel=1e-9)
    x, steps = 1.0, 0
    while x < 10:  # SGD along v
        x, steps = x * (1 + 0.5 * 0.01), steps + 1
    assert steps - 1 < certificate.escape_steps(0.5) <= steps
    assert certificate.escape_steps(0.0) is None
    text = str(certificate)
    assert text.startswith("This point is second-order stationary, but not a minimum: the gradient is at most epsilon")
    assert "not a minimum: v has curvature -1.0e-02" in text
    assert "rests on the estimate" not in text  # rho was given
    saddle = certify_point(Ridge(0.01), torch.zeros(3).double(), hessian_lipschitz=0.99 * certificate.saddle_below_rho)
    assert saddle.verdict == Verdict.SADDLE
    assert saddle.escape_steps(0.5) == pytest.approx(certificate.escape_steps(0.5), rel=1e-9)


def test_an_estimated_rho_is_said_to_be_one() -> None:
    """x_0^3 has rho = 6 along v, with which curvature -0.01 passes."""

    def cubic(x: Tensor) -> Tensor:
        return Ridge(0.01)(x) + x[0] ** 3

    certificate = certify_point(cubic, torch.zeros(3).double(), hessian_lipschitz=None)
    assert certificate.hessian_lipschitz_estimated
    assert certificate.hessian_lipschitz == pytest.approx(6.0, rel=1e-6)
    assert certificate.threshold == pytest.approx(-math.sqrt(6.0 * 1e-2))
    assert "estimated along v" in str(certificate)
    assert certificate.verdict == Verdict.SECOND_ORDER_STATIONARY
    assert "it rests on the estimate of rho: below rho = 1.0e-02 this is a saddle; a larger one" in str(certificate)
    kept = json.loads(json.dumps(certificate.to_dict(0.5)))
    assert (kept["verdict"], kept["lambda_min_upper"]) == (certificate.verdict.value, certificate.lambda_min_upper)
    assert "escape_direction" not in kept
    assert kept["saddle_below_rho"] == certificate.saddle_below_rho
    assert (kept["lr"], kept["escape_steps"]) == (0.5, certificate.escape_steps(0.5))
    assert (certificate.to_dict()["lr"], certificate.to_dict()["escape_steps"]) == (None, None)


@pytest.mark.parametrize(
    ("least", "said", "judged"),
    [
        (-0.5, "This is not a minimum: along v the curvature is at most {upper}, and a step of", "saddle"),
        (
            0.25,
            "There is no negative curvature here: with probability 0.999 every curvature is at least {lower}",
            STATIONARY,
        ),
        (0.0, "This is undecided: the smallest curvature is between {lower} and {upper}", STATIONARY),
    ],
)
def test_without_epsilon_the_verdict_is_on_the_curvature_alone(least: float, said: str, judged: str) -> None:
    """f = x^T diag(least, ..., 2) x / 2 + 0.3 x_0 at 0: lambda_min is `least`, and the gradient has norm 0.3."""

    def sloped(x: Tensor) -> Tensor:
        return (torch.linspace(least, 2, len(x), dtype=x.dtype) * x**2).sum() / 2 + 0.3 * x[0]

    at = torch.zeros(20, dtype=torch.float64)
    found = certify_point(sloped, at, epsilon=None, hessian_lipschitz=0.1)
    lower, upper = f"{found.lambda_min_lower:.3e}", f"{found.lambda_min_upper:.3e}"
    assert found.lambda_min_lower - 1e-12 <= least <= found.lambda_min_upper + 1e-12
    assert found.lambda_min_upper == pytest.approx(least, abs=0.02)
    first, *_ = lines = str(found).splitlines()
    assert first.startswith(said.format(lower=f"{found.lambda_min_lower:.2g}", upper=f"{found.lambda_min_upper:.2g}"))
    assert "  gradient norm 3.000e-01" in lines
    assert "  no verdict on stationarity without epsilon (--epsilon), the threshold of the gradient norm" in lines
    kept = found.to_dict()
    assert (kept["verdict"], kept["answer"]) == (found.verdict.value, first)
    assert (kept["epsilon"], kept["threshold"], kept["saddle_below_rho"]) == (None, None, None)
    line = f"step 5: {found.verdict}, gradient norm 3.000e-01, lambda_min in [{lower}, {upper}]"
    assert certificate_line(found, 5) == line

    # With epsilon the point is judged: the threshold of the curvature is -sqrt(0.1 * 0.4) = -0.2.
    for epsilon, verdict in ((0.2, "gradient too large"), (0.4, judged)):
        given = certify_point(sloped, at, epsilon=epsilon, hessian_lipschitz=0.1)
        assert (given.verdict, str(given).splitlines()[0]) == (verdict, given.answer)
        assert f"gradient norm 3.000e-01, epsilon {epsilon:.3e}\n" in str(given)
        assert "without epsilon" not in str(given)


def test_a_large_gradient_is_all_that_is_said() -> None:
    """No product is computed, and one batch says nothing of the gradient's standard error."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(6, 6), 100 * torch.randn(50, 6)
    found = certify(model, lambda m, batch: m(batch).square().mean(), [x], epsilon=1e-2, sample_of=1000)
    text = str(found)
    assert found.verdict is Verdict.GRADIENT_TOO_LARGE
    assert text.startswith("This point is not stationary: the gradient's norm is ")
    assert "whether there is negative curvature too was not searched: search=Search(always=True) looks for it" in text
    assert "lambda" not in text
    assert found.hvps == 0
    assert found.escape_direction is found.hessian_lipschitz is found.threshold is None
    assert found.smallest_epsilon == math.inf
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["lambda_min_upper"] is None
    assert ("standard error unknown: one batch" in text) == math.isinf(found.grad_norm_error or 0.0)
