"""Spectral densities against dense Hessians: their standard errors are right, and shares lie within their bounds."""

import math
from typing import Any

import pytest
import torch
from searches import Point, arguments
from torch import Tensor

from packsaddle import simulate
from packsaddle.curvature import SpectralDensity, spectral_density

EIGENVALUES = torch.cat([torch.linspace(-1, 2, 40), torch.tensor([9.0])]).double()


def loss_fn(model: Any, batch: Tensor) -> Tensor:
    """f = sum_i lambda_i x_i^2 / 2, whose Hessian is as good as any with these eigenvalues: probes have no axes."""
    return (EIGENVALUES * model.x.square()).sum() / 2


def measured(seed: int, **options: Any) -> SpectralDensity:
    at = Point(torch.zeros(len(EIGENVALUES), dtype=torch.float64))
    return spectral_density(at, loss_fn, [torch.zeros(1)], **arguments(seed=seed, **options))


def smoothed(at: tuple[float, ...], width: float) -> Tensor:
    """The density of all eigenvalues."""
    apart = torch.tensor(at, dtype=torch.float64)[:, None] - EIGENVALUES
    return (torch.exp(-(apart**2) / (2 * width**2)) / (width * math.sqrt(2 * math.pi))).mean(1)


@pytest.mark.slow
def test_standard_errors_are_those_of_the_estimates() -> None:
    """Deviations in units of their standard errors have variance 1; of 12 probes Student's t has 11 / 9."""
    squares, traces = [], []
    for seed in range(8):
        found = measured(seed, probes=12, steps=12, width=0.8, points=9)
        exact = smoothed(found.values, 0.8)
        apart = torch.tensor(found.density, dtype=torch.float64) - exact
        squares.append(float((apart / torch.tensor(found.error)).square()[1:-1].mean()))
        traces.append((found.trace.mean - float(EIGENVALUES.sum())) / found.trace.error)
    assert sum(squares) / 8 == pytest.approx(11 / 9, rel=0.8)
    assert sum(t * t for t in traces) / 8 == pytest.approx(11 / 9, rel=0.9)


def test_shares_lie_within_their_bounds() -> None:
    found = measured(0, probes=60, steps=10)
    for t in (-2.0, 0.0, 1.0, 8.0, 20.0):
        exact = sum(value < t for value in EIGENVALUES.tolist()) / len(EIGENVALUES)
        least, most = found.share_below(t)
        assert least.mean - 4 * least.error <= exact <= most.mean + 4 * most.error
        assert most.mean - least.mean < 0.35
    text = str(found)
    assert "spectral density of 41 eigenvalues from 60 probes, 601 products by double backward" in text


def test_workers_find_one_density() -> None:
    first, second = simulate(lambda rank: measured(rank, probes=2, steps=5), 2)
    assert first.density == second.density


def test_bad_arguments_are_named() -> None:
    for name, value in (("probes", 0), ("steps", 0), ("points", 0), ("width", 0.0), ("width", math.inf)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            measured(0, **{name: value})
