"""A loss that stands still: since when, and at what level, told from a run's recorded training loss.

A line through the last part of the losses says by how much they fell there, and how they scatter says how sure that
is. The loss stands still if that fall is no more than twice its standard error, or negligible, and the standard error
is small enough that a fall of note would have shown. So noise makes the rule silent; it does not make it fire. Whether
it is a plateau or a minimum losses cannot tell.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LEAST_LINES = 8  # of a window, which is cut into as many blocks
LEAST_SHARE = 1 / 3  # of the run
NEGLIGIBLE = 0.005  # a fall of so much of the loss over the window, or less
SURE = 0.01  # the standard error of that fall, as a share of the loss, at most


@dataclass(frozen=True)
class Standstill:
    """The last part of a run, in which its loss did not fall."""

    since: int  # the step it began at
    lines: int  # of metrics since then
    level: float  # the mean loss from there on
    fall: float  # along the line through it; negative: it rose
    error: float  # the standard error of that


def standstill(metrics: Sequence[dict[str, Any]]) -> Standstill | None:
    """Return since when the loss has stood still up to the end of a run's lines of metrics; None if it has not, or if
    there are too few lines or too much scatter to say.

    The window is the longest one that stands still, of at least a third of the lines and 8 of them. A line covers the
    steps since the one before it, so the window begins there.
    """
    n = len(metrics)
    losses = [line["loss"] for line in metrics]
    first = next((i + 1 for i in reversed(range(n)) if not math.isfinite(losses[i])), 0)
    latest = n - max(LEAST_LINES, math.ceil(n * LEAST_SHARE))
    if latest < first or not _level(*trend(losses[latest:])):  # it may be about to leave
        return None
    for start in range(first, latest + 1):
        level, fall, error = trend(losses[start:])
        if error <= SURE * abs(level) and _level(level, fall, error):
            return Standstill(metrics[start - 1]["step"] if start else 0, n - start, level, fall, error)
    return None


def trend(losses: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of at least 8 losses, their fall from end to end along the least-squares line, and the standard
    error of that.

    The error is the larger of two: by the scatter of single losses about the line, as if they were independent, and by
    that of the means of eight blocks, which is the larger one where neighbours are alike, as on a slow swing.
    """
    n, scale = len(losses), max(map(abs, losses)) or 1.0  # squares of large numbers overflow
    losses = [loss / scale for loss in losses]
    edges = [round(b * n / LEAST_LINES) for b in range(LEAST_LINES + 1)]
    blocks = [math.fsum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    slope, scatter = _line(losses)
    error = max(scatter * (n - 1), _line(blocks)[1] * (LEAST_LINES - 1))
    return math.fsum(losses) / n * scale, -slope * (n - 1) * scale, error * scale


def _level(level: float, fall: float, error: float) -> bool:
    return abs(fall) <= max(2 * error, NEGLIGIBLE * abs(level))


def _line(y: Sequence[float]) -> tuple[float, float]:
    """The slope of the least-squares line through y_0, y_1, ..., and its standard error."""
    n = len(y)
    x0, y0 = (n - 1) / 2, math.fsum(y) / n
    spread = n * (n * n - 1) / 12
    slope = math.fsum((x - x0) * (value - y0) for x, value in enumerate(y)) / spread
    left = math.fsum((value - y0 - slope * (x - x0)) ** 2 for x, value in enumerate(y))
    return slope, math.sqrt(left / (n - 2) / spread)
