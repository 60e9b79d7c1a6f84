"""The effective step of a coordinate that waits: against its recursion, dense Hessians, a network that dies."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from searches import derivatives
from torch import Tensor, nn

from lab.runs.step_stability import LIMIT, CoordinateStep, Overshoot, largest_overshoot
from packsaddle import CompressedSGD, Compression, Identity, RandomK, TopK
from packsaddle.curvature import Curvature


def growth(a: float) -> float:
    def rate(u: float) -> float:
        return float(np.log(abs(1 - a * u)) * np.exp(-u))

    return float(quad(rate, 0, 1 / a, limit=200)[0] + quad(rate, 1 / a, 60, limit=400)[0])


def test_the_limit_is_where_a_coordinate_that_waits_begins_to_grow() -> None:
    assert growth(LIMIT * 0.999) < 0 < growth(LIMIT * 1.001)


@pytest.mark.parametrize(("gain", "grows"), [(2.2, False), (3.2, True)])
def test_a_run_of_random_k_grows_beyond_it_and_not_below(gain: float, grows: bool) -> None:
    """f = sum_j H_j x_j^2 / 2 with RandomK 2% and no noise; the median of 400 coordinates tells."""
    eta, ratio, d = 0.1, 0.02, 400
    curvature = gain * ratio / eta
    x = nn.Parameter(torch.ones(d, 1, dtype=torch.float64))
    opt = CompressedSGD([x], eta, Compression(RandomK(ratio, block_size=1), dense_below=0, max_skipped=None))
    for _ in range(1500):
        x.grad = curvature * x.detach()
        opt.step()
    assert (float(x.detach().abs().median()) > 1) == grows


class Quadratic(nn.Module):
    """f = x^T H x / 2 of two parameters, whose Hessian is known."""

    def __init__(self, hessian: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(4, 5).double()), nn.Parameter(torch.zeros(10).double())
        self.hessian = hessian

    def forward(self) -> Tensor:
        x = torch.cat([self.a.reshape(-1), self.b])
        return 0.5 * x @ self.hessian @ x


def at(model: Quadratic) -> Curvature:
    return derivatives(model, lambda m, batch: m(), [torch.zeros(1)])


@pytest.mark.parametrize("seed", range(2))
def test_the_worst_coordinate_of_a_dense_hessian_is_found(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(30, 30, generator=rng, dtype=torch.float64)
    hessian = root @ root.T / 100
    hessian[7, 7] += 4.0
    hessian[23, 23] += 9.0
    steps = [CoordinateStep("a", 0.1, 50.0), CoordinateStep("b", 0.1, 1.0)]
    found = largest_overshoot(at(Quadratic(hessian)), steps, torch.Generator().manual_seed(seed))
    assert (found.step.name, found.index) == ("a", (1, 2))  # 4 waiting 50 steps is worse than 9 at once
    assert found.curvature == pytest.approx(float(hessian[7, 7]), rel=1e-12)
    assert found.gain == pytest.approx(5.0 * float(hessian[7, 7]), rel=1e-12)
    assert found.is_unstable


class SavedGradient(torch.autograd.Function):
    """x^T H x / 2 with a backward that returns the gradient of the forward pass: a constant for double backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, hessian: Tensor) -> Tensor:
        ctx.save_for_backward(hessian @ x)
        return 0.5 * x @ hessian @ x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


class Fused(Quadratic):
    """The quadratic of a fused kernel, with a second term that torch differentiates twice."""

    def forward(self) -> Tensor:
        x = torch.cat([self.a.reshape(-1), self.b])
        return SavedGradient.apply(x, self.hessian) + 0.05 * x.square().sum()


def test_a_function_that_double_backward_leaves_out_is_detected() -> None:
    """Double backward finds the second term alone, and calls a step of gain 20 stable."""
    hessian = torch.diag(torch.linspace(0.1, 1.0, 30, dtype=torch.float64))
    hessian[7, 7] = 4.0
    steps = [CoordinateStep("a", 0.1, 50.0), CoordinateStep("b", 0.1, 1.0)]
    found = largest_overshoot(at(Fused(hessian)), steps, torch.Generator().manual_seed(0))
    assert (found.step.name, found.index) == ("a", (1, 2))
    assert found.curvature == pytest.approx(4.1, rel=1e-6)
    assert found.curvature <= 4.1
    assert found.is_unstable


def test_waits_are_by_tensor_and_only_where_they_are_known() -> None:
    def made(compressor: RandomK | TopK | Identity, below: int) -> list[float] | None:
        weights = [nn.Parameter(torch.ones(n, m)) for n, m in ((10, 10), (3, 1), (20, 20))]
        return CompressedSGD(weights, 0.1, Compression(compressor, dense_below=below)).waits()

    assert made(RandomK(0.1, block_size=1), 50) == pytest.approx([10.0, 1.0, 10.0])
    assert made(Identity(), 50) == [1.0, 1.0, 1.0]
    assert made(TopK(0.1), 50) is None


def test_the_advice_names_the_coordinate_and_settings_that_are_stable() -> None:
    before = Overshoot(CoordinateStep("decoder.bias", 0.1, 1000.0), (12,), 0.139)
    text = before.advice()
    for part in ("decoder.bias[12] waits 1/mu = 1,000 steps", "eta/mu = 100", "0.139", "13.9", "lr below 0.019"):
        assert part in text, text
    assert "dense_below = 256" in text
    assert not Overshoot(CoordinateStep("w", 0.1 * LIMIT / before.gain * 0.99, 1000.0), (0, 0), 0.139).is_unstable
