"""The effective step of a coordinate that waits: against its recursion and dense Hessians."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from searches import derivatives
from torch import Tensor, nn

from lab.runs.step_stability import LIMIT, CoordinateStep, largest_overshoot
from packsaddle import CompressedSGD, Compression, Identity, RandomK, TopK
from packsaddle.curvature import Curvature


def growth(a: float) -> float:
    def rate(u: float) -> float:
        return float(np.log(abs(1 - a * u)) * np.exp(-u))

    return float(quad(rate, 0, 1 / a, limit=200)[0] + quad(rate, 1 / a, 60, limit=400)[0])


def test_the_limit_is_where_a_coordinate_that_waits_begins_to_grow() -> None:
    assert growth(LIMIT * 0.999) < 0 < growth(LIMIT * 1.001)


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


def test_waits_are_by_tensor_and_only_where_they_are_known() -> None:
    def made(compressor: RandomK | TopK | Identity, below: int) -> list[float] | None:
        weights = [nn.Parameter(torch.ones(n, m)) for n, m in ((10, 10), (3, 1), (20, 20))]
        return CompressedSGD(weights, 0.1, Compression(compressor, dense_below=below)).waits()

    assert made(RandomK(0.1, block_size=1), 50) == pytest.approx([10.0, 1.0, 10.0])
    assert made(Identity(), 50) == [1.0, 1.0, 1.0]
    assert made(TopK(0.1), 50) is None
