"""The perturbation is Gaussian, shared, and follows its schedule."""

import math

import pytest
import torch
from scipy.stats import kstest

from packsaddle import Ramp
from packsaddle.feedback.noise import Noise


def test_law() -> None:
    xi = Noise(0.3).vector(torch.zeros(100_000, dtype=torch.float64), seed=1, step=2)
    assert xi is not None
    assert kstest(xi.numpy() / 0.3, "norm").pvalue > 1e-3


def test_shared_and_fresh() -> None:
    like = torch.zeros(8)
    draws = {(s, t): Noise(1.0).vector(like, seed=s, step=t) for s in (0, 1) for t in (0, 1)}
    again = Noise(1.0).vector(like, seed=1, step=0)
    assert again is not None
    assert torch.equal(again, draws[1, 0])  # type: ignore[arg-type]
    assert len({tuple(d.tolist()) for d in draws.values() if d is not None}) == 4


def test_zero_noise_draws_nothing() -> None:
    assert Noise(0.0).vector(torch.zeros(3), seed=0, step=0) is None


def test_ramp() -> None:
    ramp = Ramp(0.01, start=10, stop=20, final=0.002)
    assert [ramp(t) for t in (0, 10, 20, 99)] == [0.01, 0.01, 0.002, 0.002]
    assert ramp(15) == pytest.approx(0.006)
    assert Ramp(1.0, start=5, stop=5)(5) == 0.0


@pytest.mark.parametrize(
    ("start", "stop", "final"), [(0, 0, 0.0), (3, 9, 0.0), (0, 12, 0.1), (5, 40, 0.2), (50, 60, 0.0)]
)
def test_squares_of_a_ramp_are_summed(start: int, stop: int, final: float) -> None:
    ramp = Ramp(0.3, start, stop, final)
    for steps in (1, 4, 20, 30):
        assert ramp.squares(steps) == pytest.approx(math.fsum(ramp(t) ** 2 for t in range(steps)), rel=1e-12)


@pytest.mark.parametrize("noise", [-0.1, float("nan"), float("inf"), lambda step: -1.0])
def test_bad_noise(noise: float) -> None:
    with pytest.raises(ValueError, match="noise must be finite and not negative"):
        Noise(noise)


def test_bad_ramp() -> None:
    with pytest.raises(ValueError, match=r"std of Ramp must be finite and not negative, got -1"):
        Ramp(-1.0, 0, 1)
    with pytest.raises(ValueError, match=r"0 <= start <= stop, got start=3, stop=2"):
        Ramp(1.0, 3, 2)
