"""Curves over seeds as a table of plain numbers, small enough to keep: what figures are drawn from."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packsaddle.aggregate import Axis, Setting, band
from packsaddle.schema import ConfigError
from packsaddle.wording import cell, read_cell

AXES: tuple[Axis, ...] = ("step", "epoch", "megabytes", "seconds")
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
    """Average a setting's metrics over its seeds, line by line; axes and `seeds` are of all that wrote the line."""
    lines = {axis: band(setting, "step", axis) for axis in AXES}
    if (first := lines["step"]) is None:
        return Curve(setting.label, {name: [] for name in _names()})
    columns = {axis: b.x for axis, b in lines.items() if b is not None} | {"seeds": [float(n) for n in first.seeds]}
    for quantity in QUANTITIES:
        found = band(setting, quantity, "step")
        for part in _PARTS:
            by_step = {} if found is None else dict(zip(found.x, getattr(found, part), strict=True))
            columns[f"{quantity}_{part}"] = [by_step.get(step, math.nan) for step in first.x]
    return Curve(setting.label, columns)


def _names() -> list[str]:
    return [*AXES, "seeds", *(f"{quantity}_{part}" for quantity in QUANTITIES for part in _PARTS)]


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write a CSV, a line per setting and step, to six digits; empty where nothing was measured."""
    with path.open("w", newline="") as file:
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
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(read_cell(row["setting"]), []).append(row)
        return [
            Curve(setting, {n: [float(r[n]) if r[n] else math.nan for r in rows] for n in _names()})
            for setting, rows in found.items()
        ]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold curves: {error}") from None


def pick(curves: Sequence[Curve], settings: Iterable[str]) -> list[Curve]:
    """Return the curves of these settings, in this order. Raises ConfigError that names one that is missing."""
    by_setting = {c.setting: c for c in curves}
    try:
        return [by_setting[setting] for setting in settings]
    except KeyError as missing:
        raise ConfigError(f"the figure needs a curve of every setting, but {missing} has none") from None
