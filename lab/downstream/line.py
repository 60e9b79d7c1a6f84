"""The line of dense models, loss after fine-tuning against pretraining loss, and residuals of other models from it.

Dense models have seeds and lengths, and y = a_seed + b x with one slope b and an intercept per seed, since models of
one seed have the same initial weights and batches. The line is exact least squares, and its error is that of ordinary
regression: the deviations of dense models, with as many degrees of freedom as models less parameters.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from scipy.stats import t


@dataclass(frozen=True)
class Point:
    """A model: its seed, pretraining loss x and loss y after fine-tuning."""

    seed: int
    x: float
    y: float


@dataclass(frozen=True)
class Residuals:
    """Residuals of one group of models, with the 95% interval of their mean."""

    values: tuple[float, ...]  # one per model
    half_width: float  # of the interval

    @property
    def mean(self) -> float:
        return fmean(self.values)

    def __str__(self) -> str:
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.4f} [{low:+.4f}, {high:+.4f}], {min(self.values):+.4f} to {max(self.values):+.4f}"


@dataclass(frozen=True)
class Line:
    """Parallel lines, one per seed."""

    slope: float
    intercepts: dict[int, float]  # by seed
    spread: float  # sum of squares of x about the means of seeds
    deviation: float  # standard deviation of dense models from the line
    freedom: int  # degrees of freedom of the deviation
    count: int  # number of dense models
    center: float  # mean of x over them

    @classmethod
    def fit(cls, points: Sequence[Point]) -> "Line":
        """Fit by least squares. Raises ValueError for fewer than three models, or models without different x."""
        groups = {seed: [p for p in points if p.seed == seed] for seed in sorted({p.seed for p in points})}
        means = {seed: (fmean(p.x for p in group), fmean(p.y for p in group)) for seed, group in groups.items()}
        freedom = len(points) - len(groups) - 1
        spread = sum((p.x - means[p.seed][0]) ** 2 for p in points)
        if freedom < 1 or spread == 0:
            raise ValueError(f"a line needs a model more than parameters, and different x, got {len(points)} models")
        slope = sum((p.x - means[p.seed][0]) * (p.y - means[p.seed][1]) for p in points) / spread
        intercepts = {seed: y - slope * x for seed, (x, y) in means.items()}
        squares = sum((p.y - intercepts[p.seed] - slope * p.x) ** 2 for p in points)
        center = fmean(p.x for p in points)
        return cls(slope, intercepts, spread, math.sqrt(squares / freedom), freedom, len(points), center)

    def residual(self, point: Point) -> float:
        """Return y minus the line of the point's seed."""
        return point.y - self.intercepts[point.seed] - self.slope * point.x

    def residuals(self, points: Sequence[Point]) -> Residuals:
        """Return the residuals of models that are not in the line, one of each seed.

        The interval assumes that they deviate by the standard deviation of dense models.
        Raises ValueError if they are not one model of each of the line's seeds.
        """
        if sorted(p.seed for p in points) != sorted(self.intercepts):
            raise ValueError(f"models must have seeds {sorted(self.intercepts)}, got {sorted(p.seed for p in points)}")
        away = fmean(p.x for p in points) - self.center
        variance = 1 / len(points) + 1 / self.count + away**2 / self.spread
        width = float(t.ppf(0.975, self.freedom)) * self.deviation * math.sqrt(variance)
        return Residuals(tuple(self.residual(p) for p in points), width)
