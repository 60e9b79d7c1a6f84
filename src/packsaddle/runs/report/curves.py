"""Curves over seeds as a table of plain numbers, small enough to keep: what figures are drawn from.

Marks belong to the curves: certificates, the levels of plateaus, and losses that stand still. To find the last, a line
is fitted to the last part of a run's training losses: its slope says how much they fell there, and their scatter how
sure that is. A loss stands still if that fall is no more than twice its standard error, or negligible, and the
standard error is small enough that a substantial fall would have shown. So noise can hide a standstill, but not
simulate one. Losses alone cannot tell a plateau from a minimum.
"""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from packsaddle.errors import ConfigError
from packsaddle.messages import cell, read_cell
from packsaddle.runs.report.settings import Axis, Setting, position
from packsaddle.runs.run_folder import Run

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


AXES: tuple[Axis, ...] = ("step", "epoch", "megabytes", "seconds", "rounds")
QUANTITIES = ("loss", "grad_norm", "test_loss", "test_accuracy")
_PARTS = ("mean", "low", "high")


@dataclass(frozen=True)
class Curve:
    """One setting's quantities along the axes; lists of one length, NaN where a quantity was not measured."""

    setting: str
    columns: dict[str, list[float]]  # the axes, seeds, and loss_mean, loss_low (10%), loss_high (90%), ...

    def along(self, axis: str, quantity: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """Return x, mean, 10% and 90% quantile where the quantity was measured."""
        c = self.columns
        rows = zip(c[axis], *(c[f"{quantity}_{part}"] for part in _PARTS), strict=True)
        kept = [row for row in rows if not math.isnan(row[1])]
        x, mean, low, high = zip(*kept, strict=True) if kept else ((), (), (), ())
        return list(x), list(mean), list(low), list(high)


def curve(setting: Setting) -> Curve:
    """Average a setting's metrics over its seeds, step by step; axes and `seeds` are of all that wrote the line."""
    by_step: dict[int, list[dict[str, Any]]] = {}
    for run in setting.runs:
        for line in run.metrics:
            by_step.setdefault(int(line["step"]), []).append(line)
    lines = [by_step[step] for step in sorted(by_step)]
    columns: dict[str, list[float]] = {
        axis: [_mean([position(line, axis) for line in same]) for same in lines] for axis in AXES
    }
    columns["seeds"] = [float(len(same)) for same in lines]

    # Bands are from the 10% to the 90% quantile.
    for quantity in QUANTITIES:
        values = [[float(line[quantity]) for line in same if line.get(quantity) is not None] for same in lines]
        columns[f"{quantity}_mean"] = [_mean(v) for v in values]
        columns[f"{quantity}_low"] = [_quantile(v, 0.1) for v in values]
        columns[f"{quantity}_high"] = [_quantile(v, 0.9) for v in values]
    return Curve(setting.label, columns)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _quantile(values: Sequence[float], q: float) -> float:
    """numpy.quantile's answer, NaN where a value is not finite or there is none; much sooner for a few values."""
    if not values or any(not math.isfinite(v) for v in values):
        return math.nan
    ordered, place = sorted(values), q * (len(values) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def _names() -> list[str]:
    return [*AXES, "seeds", *(f"{quantity}_{part}" for quantity in QUANTITIES for part in _PARTS)]


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write a CSV, a line per setting and step, to six digits; empty where nothing was measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", *_names()])
        for c in curves:
            for values in zip(*(c.columns[name] for name in _names()), strict=True):
                writer.writerow([cell(c.setting), *(_text(v) for v in values)])


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"


def read_curves(path: Path) -> list[Curve]:
    """Read what `write_curves` wrote. Raises ConfigError if it is not that."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                found.setdefault(read_cell(row["setting"]), []).append(row)
        return [Curve(setting, {n: [_number(r, n) for r in rows] for n in _names()}) for setting, rows in found.items()]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold curves: {error}") from None


def _number(row: dict[str, Any], name: str) -> float:
    """A number in a row; rounds are not in every file."""
    text = row.get(name) if name == "rounds" else row[name]
    return float(text) if text else math.nan


@dataclass(frozen=True)
class Point:
    """A certificate of a run, and where it lies along every axis."""

    run: Run
    x: dict[str, float]
    certificate: dict[str, Any]

    @property
    def looked(self) -> bool:
        """True if curvature was looked at: not so if the gradient was too large."""
        return bool(self.certificate["verdict"] != "gradient too large")


def points(setting: Setting) -> list[Point]:
    """Return the certificates along a setting's runs that bound the smallest eigenvalue."""
    return [
        Point(run, _place(run, c), c)
        for run in setting.runs
        for c in run.certificates
        if run.metrics and c.get("lambda_min_lower") is not None and c.get("lambda_min_upper") is not None
    ]


def _place(run: Run, certificate: dict[str, Any]) -> dict[str, float]:
    """Return the position of a certificate. Bytes and seconds are the last line's before it, else the first's: a
    logarithmic axis has no zero."""
    line = next((m for m in reversed(run.metrics) if m["step"] <= certificate["step"]), run.metrics[0])
    exact = {axis: float(certificate[axis]) for axis in ("step", "epoch")}
    return {axis: exact[axis] if axis in exact else position(line, axis) for axis in AXES}


@dataclass(frozen=True)
class Still:
    """The part of a run in which its loss stood still: from its first line to its last along every axis."""

    run: Run
    x: dict[str, tuple[float, float]]
    found: Standstill


def stills(setting: Setting) -> list[Still]:
    """Return where the losses of a setting's runs stood still up to their ends."""
    marked = []
    for run in setting.runs:
        if (found := standstill(run.metrics)) is not None:
            first, last = run.metrics[-found.lines], run.metrics[-1]
            marked.append(Still(run, {axis: (position(first, axis), position(last, axis)) for axis in AXES}, found))
    return marked


def plateaus(settings: Sequence[Setting]) -> list[float]:
    """Return the levels of the plateaus that configurations name."""
    found = {s.config["plateau"] for s in settings if s.config.get("plateau") is not None}
    return sorted(level for level in found if math.isfinite(level))


def smallest_threshold(settings: Sequence[Setting]) -> float:
    """Return the start of the logarithmic part of the curvature's axis: a tenth of the smallest threshold."""
    found = [-p.certificate["threshold"] for s in settings for p in points(s) if p.certificate.get("threshold")]
    return float(min((t for t in found if 0 < t < math.inf), default=1.0)) / 10
