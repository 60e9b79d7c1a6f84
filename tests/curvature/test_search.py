"""What a search finds besides the verdict, and the precision of the losses that it is told of."""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from searches import Point, certified, derivatives
from torch import Tensor, nn

from packsaddle import Verdict
from packsaddle.curvature import Bounds

D, N = 12, 512


def quadratic(model: nn.Module, batch: Tensor) -> Tensor:
    """A mean of x^T diag(z) x / 2 over rows z: the Hessian of a batch is the diagonal of its mean row."""
    x = model.x
    return (batch * x.square()).sum(1).mean() / 2  # type: ignore[operator, union-attr, no-any-return]


def rows(last: float, spread: float = 0.3) -> Tensor:
    """N rows about (2, ..., 2, last)."""
    rng = torch.Generator().manual_seed(0)
    means = torch.full((D,), 2.0, dtype=torch.float64)
    means[-1] = last
    return means + spread * torch.randn(N, D, generator=rng, dtype=torch.float64)


def at_zero() -> Point:
    return Point(torch.zeros(D, dtype=torch.float64))


def certificate(data: Tensor, **options: Any) -> Any:
    given = {"epsilon": 1.0, "hessian_lipschitz": 0.25, "seed": 1, **options}
    return certified(at_zero(), quadratic, list(data.split(8)), **given)


def test_sharpness_bounds_the_largest_eigenvalue() -> None:
    rng = torch.Generator().manual_seed(3)
    data = torch.rand(N, D, generator=rng, dtype=torch.float64) + torch.arange(D)
    exact = float(data.mean(0).max())
    rough, sharp = (certificate(data, sharpness=s, failure_probability=0.01) for s in (math.inf, 1e-3))
    assert sharp.hvps > rough.hvps
    assert sharp.lambda_max_upper - sharp.lambda_max_lower <= 1e-3 * exact
    assert sharp.lambda_max_lower - 1e-9 <= exact <= sharp.lambda_max_upper + 1e-9
    w = sharp.sharpest_direction
    assert float(w @ (data.mean(0) * w)) == pytest.approx(sharp.lambda_max_lower, abs=1e-9)


def test_sharpness_is_asked_for_where_the_gradient_is_too_large() -> None:
    data = rows(-1.0)

    def sloped(model: nn.Module, batch: Tensor) -> Tensor:
        return quadratic(model, batch) + 10 * model.x.sum()  # type: ignore[operator, union-attr]

    settings: dict[str, Any] = {"epsilon": 1.0, "hessian_lipschitz": 0.25, "sharpness": 0.1}
    found = certified(at_zero(), sloped, list(data.split(8)), **settings)
    assert found.verdict is Verdict.GRADIENT_TOO_LARGE
    assert found.lambda_max_upper - found.lambda_max_lower <= 0.1 * found.lambda_max_upper
    assert "lambda_max" in str(found)


def test_progress_tells_bounds_that_close_in() -> None:
    """Each product takes two backward passes, and the gradient one."""
    told: list[Bounds] = []
    data = rows(-1.0)
    found = certificate(data, progress=told.append)
    exact = float(data.mean(0).min())
    assert found.backward_passes == 1 + 2 * found.hvps
    assert [b.products for b in told] == list(range(1, len(told) + 1))
    assert all(b.lambda_min[0] <= exact + 1e-9 for b in told)
    assert all(b.lambda_min[1] >= exact - 1e-9 for b in told)
    assert all(later.lambda_min[1] <= earlier.lambda_min[1] + 1e-9 for earlier, later in pairwise(told))
    assert {b.threshold for b in told} == {-0.5}
    assert str(told[-1]).startswith("lambda_min in [")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_short_steps_are_taken_where_the_loss_rounds(dtype: torch.dtype) -> None:
    """A loss of fewer bits than its parameters is a staircase: a step within one stair sees none of its curvature."""
    model = Point(torch.linspace(0.5, 1.0, D, dtype=torch.float64))

    def rounded(model: nn.Module, batch: Tensor) -> Tensor:
        x = model.x
        return x.to(dtype).square().mean().double() * 5 - 0.05 * x.square().mean()  # type: ignore[operator, no-any-return]

    exact = (10 - 0.1) / D
    found = certified(model, rounded, [torch.zeros(1)], epsilon=10.0, hvp="differences")
    assert found.verdict is not Verdict.SADDLE
    assert found.lambda_min_lower <= exact <= found.lambda_max_upper
    assert found.lambda_max_lower <= exact <= found.lambda_min_upper + 2 * found.hvp_error


def test_examples_read_in_single_precision_do_not_shorten_a_loss_in_double() -> None:
    """Data that become float64 as they are read, and constants of other dtypes, are no rounding of the parameters."""

    class Batches:
        def __iter__(self) -> Iterator[Tensor]:
            yield (torch.ones(4, D) / 3).double()

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return quadratic(model, batch) * torch.ones(1, dtype=torch.float32).item()

    assert derivatives(at_zero(), loss_fn, Batches()).precision == torch.finfo(torch.float64).eps


def test_differences_in_double_precision_are_double_backward_at_kinks() -> None:
    """ReLU's kinks are further from a point than the steps that double precision allows; a first step crosses many."""
    rng = torch.Generator().manual_seed(5)
    model = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=rng))
        model[0].bias.mul_(1e-2)  # type: ignore[operator, union-attr]
    x = 1e-3 * torch.randn(256, 6, generator=rng, dtype=torch.float64)

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        return (model(batch) - 1).square().mean()

    exact, differences = (
        certified(model, loss_fn, [x], epsilon=10.0, hessian_lipschitz=1e-4, hvp=hvp)
        for hvp in ("double-backward", "differences")
    )
    assert differences.verdict is exact.verdict
    assert differences.hvp_error < 1e-6
    assert differences.lambda_min_upper == pytest.approx(exact.lambda_min_upper, abs=1e-5)
