"""Exponents of synthetic power laws, their intervals, and differences."""

import numpy as np
import pytest

from lab.paper.power_law import difference, exponent

XS = (0.05, 0.1, 0.2, 0.4)


def groups(b: float, seed: int, spread: float = 0.2, seeds: int = 20) -> dict[float, list[float]]:
    rng = np.random.default_rng(seed)
    return {x: list(30 * x**b * np.exp(spread * rng.standard_normal(seeds))) for x in XS}


@pytest.mark.parametrize("b", [-4.0, -2.5, 0.0, 1.0])
def test_an_exact_power_law_has_its_exponent_and_no_width(b: float) -> None:
    found = exponent(groups(b, 0, spread=0.0), draws=50)
    assert (found.value, found.low, found.high) == (pytest.approx(b), pytest.approx(b), pytest.approx(b))


def test_intervals_cover_the_exponent_about_as_often_as_they_say() -> None:
    covered = sum(not exponent(groups(-3.0, seed), draws=100).excludes(-3.0) for seed in range(25))
    assert covered >= 19


def test_more_noise_makes_a_wider_interval() -> None:
    narrow, wide = (exponent(groups(-3.0, 1, spread), draws=200) for spread in (0.05, 0.5))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_a_difference_is_that_of_the_exponents() -> None:
    found = difference(groups(-4.0, 2), groups(-3.25, 3), draws=500)
    assert found.low < -0.75 < found.high
    assert found.excludes(0.0)
    assert found.value == pytest.approx(-0.75, abs=0.2)


def test_two_values_of_x_or_different_ones_are_no_power_law() -> None:
    few = {0.1: [1.0], 0.2: [2.0]}
    with pytest.raises(ValueError, match="at least three"):
        exponent(few)
    with pytest.raises(ValueError, match="same values of x"):
        difference(groups(-1.0, 0), few)
