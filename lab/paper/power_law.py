"""Exponents of power laws, with bootstrap intervals over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

Groups = Mapping[float, Sequence[float]]  # variable -> measurements, one per seed


@dataclass(frozen=True)
class Exponent:
    """An exponent and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"

    def excludes(self, alternative: float) -> bool:
        """Return True if the interval does not contain the alternative."""
        return not self.low <= alternative <= self.high


def exponent(groups: Groups, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Exponent:
    """Fit b of median(y) ~ x^b by least squares on logarithms, with a bootstrap interval over the seeds of each x.

    The interval covers the variation between seeds, not deviations from a power law. Raises ValueError for fewer than
    three values of x.
    """
    return _fit([groups], [1.0], draws, level, seed)


def difference(groups: Groups, others: Groups, *, draws: int = 2000, level: float = 0.95, seed: int = 0) -> Exponent:
    """Return the exponent of `groups` minus that of `others`, over the same values of x, with its bootstrap interval.

    Raises ValueError if the values of x differ or are fewer than three.
    """
    if sorted(groups) != sorted(others):
        raise ValueError(f"both must have the same values of x, got {sorted(groups)} and {sorted(others)}")
    return _fit([groups, others], [1.0, -1.0], draws, level, seed)


def _fit(terms: Sequence[Groups], signs: Sequence[float], draws: int, level: float, seed: int) -> Exponent:
    """Return sum_i signs_i b_i and its percentile interval."""
    if any(len(groups) < 3 for groups in terms):
        raise ValueError(f"an exponent needs at least three values of x, got {[len(groups) for groups in terms]}")
    rng = np.random.default_rng(seed)
    value, found = 0.0, np.zeros(draws)
    for sign, groups in zip(signs, terms, strict=True):
        value += sign * slope(groups)

        # Medians of resampled groups, float64[draws, len(groups)], and the slopes of all draws.
        medians = [np.median(rng.choice(np.asarray(ys, float), (draws, len(ys))), axis=1) for ys in groups.values()]
        xs = np.log(list(groups))
        weights = (xs - xs.mean()) / ((xs - xs.mean()) ** 2).sum()
        found += sign * (np.log(np.stack(medians, axis=1)) @ weights)
    tail = (1 - level) / 2
    return Exponent(value, float(np.quantile(found, tail)), float(np.quantile(found, 1 - tail)))


def slope(groups: Groups) -> float:
    """Return the least-squares slope of log(median(y)) against log(x)."""
    xs = [math.log(x) for x in groups]
    ys = [math.log(median(values)) for values in groups.values()]
    return float(np.polyfit(xs, ys, 1)[0])
