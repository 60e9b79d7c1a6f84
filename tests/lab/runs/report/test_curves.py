"""The rule for a loss that stands still, on series whose answer is known."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from lab.runs.report.curves import LEAST_LINES, standstill, trend

RNG = np.random.default_rng
T = np.arange(60)


def lines(losses: Sequence[float]) -> list[dict[str, Any]]:
    return [{"step": 50 * (i + 1), "epoch": (i + 1) / 10, "loss": float(loss)} for i, loss in enumerate(losses)]


def noisy(mean: np.ndarray, share: float, seed: int) -> list[float]:
    return list(mean * (1 + share * RNG(seed).normal(size=len(mean))))


FALL_THEN_FLAT = np.where(T < 20, 0.17 - 0.083 * T / 20, 0.087)


def test_a_plateau_at_the_end_is_found_where_it_begins() -> None:
    """0.087 from line 20 on, step 1000, with the 1% scatter of the lines of a real run. Twice the error rejects one in
    twenty; of 100, 13 is four standard deviations more."""
    found = [standstill(lines(noisy(FALL_THEN_FLAT, 0.01, seed))) for seed in range(100)]
    stood = [f for f in found if f is not None]
    assert len(stood) >= 87
    assert all(f.since >= 850 and f.lines == 60 - f.since / 50 for f in stood)  # the fall is no part of it
    assert np.median([f.since for f in stood]) <= 1100
    assert [f.level for f in stood] == pytest.approx([0.087] * len(stood), rel=0.01)


@pytest.mark.parametrize(
    "losses",
    [
        1 / (1 + 0.05 * T),
        np.where(T < 45, 0.087, 0.087 * np.exp(-(T - 45) / 20)),  # it leaves
        np.where(T < 20, 0.17 - 0.083 * T / 20, np.where(T < 40, 0.087, 0.087 - 0.002 * (T - 40))),
        0.1 + 0.03 * np.sin(T / 12),
        0.1 + 0.05 * (-1.0) ** T,  # beyond stability
        np.abs(T - 40) / 100 + 0.1,  # down and up again
    ],
    ids=["1/t", "leaving", "leaving late", "slow swing", "zigzag", "V"],
)
@pytest.mark.parametrize("share", [0.0, 0.01, 0.05])
def test_what_moves_does_not_stand_still(losses: np.ndarray, share: float) -> None:
    assert [seed for seed in range(10) if standstill(lines(noisy(losses, share, seed)))] == []


def test_a_loss_that_is_constant_to_the_bit_stands_still_from_the_start() -> None:
    found = standstill(lines([0.25] * 30))
    assert found is not None
    assert (found.since, found.lines, found.level) == (0, 30, 0.25)
    assert trend([0.25] * 30) == (0.25, 0.0, 0.0)
    assert standstill(lines([0.2] * (LEAST_LINES - 1))) is None


def test_what_is_not_finite_ends_a_stretch() -> None:
    for bad in (math.nan, math.inf):
        assert standstill(lines([0.2] * 50 + [bad] + [0.2] * 9)) is None
        found = standstill(lines([0.2] * 10 + [bad] + [0.2] * 40))
        assert found is not None
        assert (found.since, found.lines) == (550, 40)
    assert standstill(lines([math.nan] * 30)) is None
