"""Curves over seeds as a table of plain numbers, small enough to keep: what figures are drawn from."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packsaddle.aggregate import Axis, Setting, band
from packsaddle.schema import ConfigError

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
    """Average a setting's metrics over its seeds, line by line."""
    by_step: dict[float, dict[str, float]] = {}
    for quantity in QUANTITIES:
        bands = {axis: band(setting, quantity, axis) for axis in AXES}
        if (first := bands["step"]) is None:
            continue
        for i, step in enumerate(first.x):
            row = by_step.setdefault(step, {})
            row |= {axis: b.x[i] for axis, b in bands.items() if b is not None}
            row |= {"seeds": first.seeds[i]}
            row |= {f"{quantity}_{part}": getattr(first, part)[i] for part in _PARTS}
    rows = [by_step[step] for step in sorted(by_step)]
    return Curve(setting.label, {name: [row.get(name, math.nan) for row in rows] for name in _names()})


def _names() -> list[str]:
    return [*AXES, "seeds", *(f"{quantity}_{part}" for quantity in QUANTITIES for part in _PARTS)]


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write a CSV, a line per setting and step, to six digits; empty where nothing was measured."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", *_names()])
        for c in curves:
            for values in zip(*(c.columns[name] for name in _names()), strict=True):
                writer.writerow([c.setting, *(_text(v) for v in values)])


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}" if value != round(value) else f"{value:.0f}"


def read_curves(path: Path) -> list[Curve]:
    """Read what `write_curves` wrote. Raises ConfigError if it is not that."""
    found: dict[str, list[dict[str, Any]]] = {}
    try:
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                found.setdefault(row["setting"], []).append(row)
        return [
            Curve(setting, {n: [float(r[n]) if r[n] else math.nan for r in rows] for n in _names()})
            for setting, rows in found.items()
        ]
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(f"{path} does not hold curves: {error}") from None
