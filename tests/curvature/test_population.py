"""Bounds for the loss that examples are drawn from, against a population whose Hessian is known."""

import math
from typing import Any

import pytest
import torch
from nightly import nightly
from scipy.stats import t as student
from searches import Point, arguments, derivatives
from torch import Tensor, nn

from packsaddle import Verdict, simulate
from packsaddle.curvature import Search, certify_population
from packsaddle.curvature.population import _quotient, _variance_norm
from packsaddle.curvature.products import DoubleBackward

D = 6


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    """A mean over rows (a, w) of w (a^T x)^2 / 2 + (0.05 a)^T x: the Hessian of a row is w a a^T."""
    a, w = batch[:, :-1], batch[:, -1]
    along = a @ model.x  # type: ignore[operator]
    return (w * along.square() / 2 + 0.05 * along).mean()


def draw(n: int, seed: int, last: float) -> Tensor:
    """Rows of one coordinate each, weights about 1 and about `last` along the last axis: H is diag(1, ..., 1, last)."""
    rng = torch.Generator().manual_seed(seed)
    axis = torch.randint(D, (n,), generator=rng)
    signs = 2.0 * torch.randint(2, (n, 1), generator=rng).double() - 1
    a = math.sqrt(D) * signs * nn.functional.one_hot(axis, D)
    w = torch.where(axis == D - 1, last, 1.0).double() + 0.3 * torch.randn(n, generator=rng, dtype=torch.float64)
    return torch.cat([a, w[:, None]], 1)


def hessian(rows: Tensor) -> Tensor:
    a, w = rows[:, :-1], rows[:, -1]
    return (a.T * w) @ a / len(rows)


def at_zero() -> Point:
    return Point(torch.zeros(D, dtype=torch.float64))


def of_batches(batches: list[Tensor], **options: Any) -> Any:
    given = {"epsilon": 1.0, "hessian_lipschitz": 0.25, "failure_probability": 0.2, "seed": 0, **options}
    return certify_population(at_zero(), loss_fn, batches, **arguments(**given))


def certificate(rows: Tensor, seed: int = 0, batch: int = 8, **options: Any) -> Any:
    return of_batches(list(rows.split(batch)), seed=seed, **options)


@pytest.mark.slow
@pytest.mark.parametrize("last", [-1.0, nightly(0.5)])
def test_bounds_hold_for_the_population(last: float) -> None:
    """E H = diag(1, ..., 1, last), E g = 0; in 10 samples all four bounds hold together but for the failure
    probability of 20%, with room for three standard deviations; the gap to the truth is not what makes them hold."""
    runs, failures, gaps = 10, 0, []
    for seed in range(runs):
        found = certificate(draw(256, seed, last), seed, batch=16)
        assert found.grad_norm_lower <= found.grad_norm <= found.grad_norm_upper
        failures += not (found.lambda_min_lower <= last <= found.lambda_min_upper and found.grad_norm_lower <= 1e-12)
        gaps.append(found.lambda_min_upper - last)
        wrong = Verdict.SECOND_ORDER_STATIONARY if last < -0.5 else Verdict.SADDLE
        failures += found.verdict is wrong
    assert failures <= 0.2 * runs
    assert sorted(gaps)[runs // 2] < 1.0


@pytest.mark.nightly
@pytest.mark.slow
def test_a_samples_least_eigenvalue_is_no_bound_of_the_populations() -> None:
    """lambda_min of few examples is below the population's in the mean, which a search over directions makes worse; a
    direction measured where it was not found does not say so (but for the failure probability of 20%)."""
    below = above = 0
    for seed in range(10):
        rows = draw(512, seed, 1.0)
        below += float(torch.linalg.eigvalsh(hessian(rows))[0]) < 0.95
        above += certificate(rows, seed, batch=32).lambda_min_upper >= 1.0
    assert below == 10
    assert above >= 9


def test_the_variances_norm_is_the_dense_ones() -> None:
    rows = draw(100, 3, -1.0)
    parts = rows.split(7)  # the last batch is smaller
    mean = hessian(rows)
    apart = sum(len(p) * (hessian(p) - mean) @ (hessian(p) - mean) for p in parts)
    exact = float(torch.linalg.eigvalsh(apart / ((len(parts) - 1) * len(rows)))[-1])  # type: ignore[operator]
    search = Search(generator=torch.Generator().manual_seed(0))
    curvature = derivatives(at_zero(), loss_fn, parts)
    found = _variance_norm(DoubleBackward(curvature), 0.01, search, lambda products: None)
    assert exact * (1 - 1e-9) <= found <= 1.5 * exact


def test_the_quotients_error_is_that_of_its_batches() -> None:
    rows, v = draw(96, 4, -1.0), torch.nn.functional.normalize(torch.arange(1.0, D + 1).double(), dim=0)
    values = torch.stack([v @ hessian(p) @ v for p in rows.split(8)])
    mean, error, degrees = _quotient(DoubleBackward(derivatives(at_zero(), loss_fn, rows.split(8))), v)
    assert mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert error == pytest.approx(float(values.std() / math.sqrt(len(values))), rel=1e-12)
    assert degrees == 11


def test_the_upper_bound_is_students() -> None:
    found = certificate(draw(4096, 0, -1.0), batch=64, failure_probability=0.05)
    assert found.verdict is Verdict.SADDLE
    quantile = student.ppf(1 - 0.05 / 5, 31)
    assert found.lambda_min_upper == pytest.approx(found.quotient + quantile * found.quotient_error, rel=1e-9)
    assert found.lambda_min_lower == -math.inf
    assert found.to_dict()["lambda_min_lower"] is None
    assert str(found).startswith("of the population: saddle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_error_of_differences_is_in_the_upper_bound(dtype: torch.dtype) -> None:
    """Of equal batches the standard error is 0, and all that the bound allows for is what differences are wrong by."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.7 * torch.randn(p.shape, generator=rng))
    x = torch.randn(16, 3, generator=rng)

    def mse(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean()

    given = arguments(epsilon=10.0, hessian_lipschitz=1e-6, failure_probability=0.05, hvp="differences", seed=1)
    found = certify_population(model.to(dtype), mse, [x.to(dtype)] * 8, **given)
    v, error = found.escape_direction, found.lambda_min_upper - found.quotient
    curvature = derivatives(model.double(), mse, [x.double()])
    assert found.quotient_error == pytest.approx(0.0, abs=0.2 if dtype is torch.bfloat16 else 1e-4)
    assert abs(found.quotient - float(v @ curvature.hessian_vector(v))) <= error


def test_a_gradient_of_the_population_may_be_too_large() -> None:
    rows = draw(512, 0, 0.5)
    rows[:, :-1] = rows[:, :-1].abs()  # E g = 0.05 E a
    found = certificate(rows, epsilon=1e-3)
    assert found.verdict is Verdict.GRADIENT_TOO_LARGE
    assert found.lambda_min_lower == -math.inf
    parts = torch.stack([0.05 * batch[:, :-1].mean(0) for batch in rows.split(8)])
    spread = math.sqrt(float(parts.var(0).sum()) / len(parts))
    assert found.grad_norm_upper - found.grad_norm == pytest.approx(spread * (1 + math.sqrt(2 * math.log(25))))


@pytest.mark.nightly
@pytest.mark.slow
def test_many_examples_settle_a_minimum() -> None:
    found = certificate(draw(8192, 1, 0.5), batch=128)
    assert found.verdict is Verdict.SECOND_ORDER_STATIONARY
    assert found.lambda_min_lower == pytest.approx(found.sample_lower - found.deviation)
    assert "is" not in str(found).split("\n")[0]
    few = certificate(draw(64, 1, 0.5))
    assert few.verdict is Verdict.UNDECIDED
    assert str(few).startswith("of the population: undecided: lambda_min may be on either side of the threshold\n")


def test_a_gradient_that_the_sample_cannot_settle_is_undecided() -> None:
    rows = draw(512, 0, 0.5)
    unsettled = certificate(rows, batch=32, epsilon=certificate(rows, batch=32).grad_norm)
    assert unsettled.verdict is Verdict.UNDECIDED
    assert str(unsettled).startswith("of the population: undecided: the gradient may be on either side of epsilon\n")


@pytest.mark.parametrize(("last", "verdict"), [(-1.0, "not a minimum"), (0.5, "no negative curvature")])
def test_without_epsilon_the_populations_curvature_alone_is_judged(last: float, verdict: str) -> None:
    found = certificate(draw(4096, 0, last), batch=64, epsilon=None)
    assert found.lambda_min_lower <= last <= found.lambda_min_upper
    upper, lower = f"at most {found.lambda_min_upper:.3e}", f"at least {found.lambda_min_lower:.3e}"
    first, norm, *_ = str(found).splitlines()
    assert first == f"of the population: {verdict}: lambda_min is {upper if last < 0 else lower}"
    assert norm == f"  gradient norm in [{found.grad_norm_lower:.3e}, {found.grad_norm_upper:.3e}]"
    kept = found.to_dict()
    assert (kept["verdict"], kept["headline"]) == (verdict, first.removeprefix("of the population: "))
    assert (kept["epsilon"], kept["threshold"]) == (None, None)


@pytest.mark.slow
@pytest.mark.parametrize("hvp", ["double-backward", nightly("differences")])
def test_workers_have_the_union(hvp: str) -> None:
    rows = draw(512, 2, 0.5)
    batches = list(rows.split(32))

    def work(rank: int) -> Any:
        # Worker 0 searches on its even batches, and worker 1 on its odd ones.
        even, odd = batches[rank * 2 :: 4], batches[rank * 2 + 1 :: 4]
        mine = [b for pair in zip(*((even, odd) if rank == 0 else (odd, even)), strict=True) for b in pair]
        return of_batches(mine, failure_probability=0.05, hvp=hvp)

    alone = certificate(rows, batch=32, failure_probability=0.05, hvp=hvp)
    for found in simulate(work, 2):
        assert found.verdict is alone.verdict
        for name in ("quotient", "quotient_error", "deviation", "grad_norm_upper", "sample_lower"):
            assert getattr(found, name) == pytest.approx(getattr(alone, name), rel=1e-5), name


def test_workers_with_one_batch_each_have_both_halves() -> None:
    batches = list(draw(512, 2, -1.0).split(64))
    assert {found.batches for found in simulate(lambda rank: of_batches([batches[rank]]), 8)} == {8}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 100}, r"batches must be 8 or more, on all workers together, got 6"),
        ({"epsilon": 0.0}, r"epsilon must be positive and finite, got 0\.0"),
        ({"hessian_lipschitz": -1.0}, r"hessian_lipschitz must be positive and finite, got -1\.0"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        certificate(draw(512, 0, 1.0), **options)
