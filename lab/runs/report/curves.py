"""The data of figures: curves over seeds as tables of numbers, and the certificates, plateaus and standstills of runs.

At a standstill, the line through the last part of a run's training losses falls by at most twice its standard error, or
negligibly, and that error is small enough to detect a substantial fall. Noise can hide a standstill, not simulate one.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from lab.runs.report.settings import Axis, Setting, position
from lab.runs.run_folder import Run
from packsaddle.errors import ConfigError

# A window is the last part of a run, in which a standstill is searched.
LEAST_LINES = 8  # minimum number of lines of metrics in a window, and the number of blocks of a window
LEAST_SHARE = 1 / 3  # minimum length of a window, as a fraction of the run
NEGLIGIBLE = 0.005  # maximum fall of the loss over a window that is negligible, as a fraction of the loss
SURE = 0.01  # maximum standard error of this fall, as a fraction of the loss


@dataclass(frozen=True)
class Standstill:
    """A standstill at the end of a run: the last part, in which its training loss did not fall."""

    since: int  # step at which the standstill begins
    lines: int  # number of lines of metrics in the standstill
    level: float  # mean loss in the standstill


def standstill(metrics: Sequence[dict[str, Any]]) -> Standstill | None:
    """Return the standstill at the end of a run's lines of metrics.

    It is the longest window at the end in which the loss does not fall, with at least 8 lines and a third of all lines.
    A line averages the steps since the previous line, so the standstill begins at the step of the line before the
    window. Returns None if there is no such window, if there are too few lines, or if the loss is too noisy.
    """
    n = len(metrics)
    losses = [line["loss"] for line in metrics]
    first = next((i + 1 for i in reversed(range(n)) if not math.isfinite(losses[i])), 0)
    latest = n - max(LEAST_LINES, math.ceil(n * LEAST_SHARE))
    # Even in the shortest window the loss may still fall, for example because it leaves a plateau.
    if latest < first or not _level(*trend(losses[latest:])):
        return None
    for start in range(first, latest + 1):
        level, fall, error = trend(losses[start:])
        if error <= SURE * abs(level) and _level(level, fall, error):
            return Standstill(metrics[start - 1]["step"] if start else 0, n - start, level)
    return None


def trend(losses: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of at least 8 losses, the fall of their least-squares line, and the fall's standard error.

    The standard error is the larger of two estimates. The first is made from the residuals of single losses, which are
    assumed to be independent. The second is made from the means of eight blocks, and is larger if neighboring losses
    are correlated.
    """
    n, scale = len(losses), max(map(abs, losses)) or 1.0  # scaled, since squares of large numbers overflow
    losses = [loss / scale for loss in losses]
    edges = [round(b * n / LEAST_LINES) for b in range(LEAST_LINES + 1)]
    blocks = [math.fsum(losses[a:b]) / (b - a) for a, b in pairwise(edges)]
    slope, scatter = _line(losses)
    error = max(scatter * (n - 1), _line(blocks)[1] * (LEAST_LINES - 1))
    return math.fsum(losses) / n * scale, -slope * (n - 1) * scale, error * scale


def _level(level: float, fall: float, error: float) -> bool:
    return abs(fall) <= max(2 * error, NEGLIGIBLE * abs(level))


def _line(y: Sequence[float]) -> tuple[float, float]:
    n = len(y)
    x0, y0 = (n - 1) / 2, math.fsum(y) / n
    spread = n * (n * n - 1) / 12
    slope = math.fsum((x - x0) * (value - y0) for x, value in enumerate(y)) / spread
    left = math.fsum((value - y0 - slope * (x - x0)) ** 2 for x, value in enumerate(y))
    return slope, math.sqrt(left / (n - 2) / spread)


AXES: tuple[Axis, ...] = ("step", "epoch", "megabytes", "seconds", "rounds")
QUANTITIES = ("loss", "grad_norm", "test_loss", "test_accuracy")
_PARTS = ("mean", "low", "high")
_NAMES = [*AXES, "seeds", *(f"{quantity}_{part}" for quantity in QUANTITIES for part in _PARTS)]


@dataclass(frozen=True)
class Curve:
    """The quantities of one setting along the axes: columns of equal length, with NaN where nothing was measured."""

    setting: str
    columns: dict[str, list[float]]  # columns by name: axes, seeds, and loss_mean, loss_low (10%), loss_high (90%), ...

    def along(self, axis: str, quantity: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """Return four columns for the points where `quantity` was measured.

        They are the positions on `axis`, and the mean, the 10% and the 90% quantile over seeds.
        """
        c = self.columns
        rows = zip(c[axis], *(c[f"{quantity}_{part}"] for part in _PARTS), strict=True)
        kept = [row for row in rows if not math.isnan(row[1])]
        x, mean, low, high = zip(*kept, strict=True) if kept else ((), (), (), ())
        return list(x), list(mean), list(low), list(high)


def curve(setting: Setting) -> Curve:
    """Return the means and quantiles of a setting's metrics over its seeds, step by step.

    The column `seeds` has the number of runs with a line of metrics at each step.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for run in setting.runs:
        for line in run.metrics:
            by_step.setdefault(int(line["step"]), []).append(line)
    lines = [by_step[step] for step in sorted(by_step)]
    columns: dict[str, list[float]] = {
        axis: [_mean([position(line, axis) for line in same]) for same in lines] for axis in AXES
    }
    columns["seeds"] = [float(len(same)) for same in lines]

    # A figure's bands extend from the 10% to the 90% quantile over seeds.
    for quantity in QUANTITIES:
        values = [[float(line[quantity]) for line in same if line.get(quantity) is not None] for same in lines]
        columns[f"{quantity}_mean"] = [_mean(v) for v in values]
        columns[f"{quantity}_low"] = [_quantile(v, 0.1) for v in values]
        columns[f"{quantity}_high"] = [_quantile(v, 0.9) for v in values]
    return Curve(setting.label, columns)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _quantile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile of values, as numpy.quantile does, but faster for few values.

    Returns NaN if a value is non-finite, or if there are no values.
    """
    if not values or any(not math.isfinite(v) for v in values):
        return math.nan
    ordered, place = sorted(values), q * (len(values) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write a CSV file with one line per setting and step, with six digits. Quantities not measured are empty cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", *_NAMES])
        for c in curves:
            for values in zip(*(c.columns[name] for name in _NAMES), strict=True):
                writer.writerow([c.setting, *(_text(v) for v in values)])


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"


def read_curves(path: Path) -> list[Curve]:
    """Read the curves in a file written by `write_curves`. Raises ConfigError if it is invalid."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["setting"], []).append(row)
        return [Curve(setting, {n: [_number(r, n) for r in rows] for n in _NAMES}) for setting, rows in found.items()]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold curves: {error}") from None


def _number(row: dict[str, Any], name: str) -> float:
    """Return the number in a cell of a CSV row; NaN if the cell is empty.

    Files of old versions have no column `rounds`.
    """
    text = row.get(name) if name == "rounds" else row[name]
    return float(text) if text else math.nan


def bounded_certificates(run: Run) -> list[dict[str, Any]]:
    """Return the certificates along a run that have bounds on the smallest eigenvalue; [] if the run has no metrics."""
    ends = ("lambda_min_lower", "lambda_min_upper")
    return [c for c in run.certificates if run.metrics and all(c.get(end) is not None for end in ends)]


def certificate_position(run: Run, certificate: dict[str, Any], axis: Axis) -> float:
    """Return the position of a run's certificate on an axis.

    Bytes, seconds and rounds are read from the last line of metrics before the certificate. If there is none, they are
    read from the first line, since a logarithmic axis has no zero.
    """
    if axis in ("step", "epoch"):
        return float(certificate[axis])
    line = next((m for m in reversed(run.metrics) if m["step"] <= certificate["step"]), run.metrics[0])
    return position(line, axis)


def plateaus(settings: Sequence[Setting]) -> list[float]:
    found = {s.config["plateau"] for s in settings if s.config.get("plateau") is not None}
    return sorted(level for level in found if math.isfinite(level))


def smallest_threshold(settings: Sequence[Setting]) -> float:
    """Return a tenth of the smallest threshold of the settings' certificates.

    The axis of eigenvalues (symlog) is linear up to this value.
    """
    certificates = [c for s in settings for run in s.runs for c in bounded_certificates(run)]
    found = [-c["threshold"] for c in certificates if c.get("threshold")]
    return float(min((t for t in found if 0 < t < math.inf), default=1.0)) / 10
