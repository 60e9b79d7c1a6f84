"""The results of a study, from the rows of its runs: summary.json, curves.csv, the figure, and sentences.

They are small enough to be committed.
"""

import csv
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from lab import charts
from lab.paper.study import Row, Run, write_json
from packsaddle.cli import plain_text, print_table
from packsaddle.errors import ConfigError

Json = Mapping[str, Any]
PLATEAU_TOLERANCE = 0.05
QUANTITIES = ("loss", "grad_norm", "test_loss", "test_accuracy")
_CERTIFIED = ("epoch", "verdict", "lambda_min_lower", "lambda_min_upper")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with a 95% confidence interval (Student's t); its ends are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values and its 95% confidence interval. Raises ValueError if there are no values.

    The ends of the interval are None for a single value and for non-finite values.
    """
    if not values:
        raise ValueError("values must hold at least one number")
    mean = fmean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, tuple(values))
    from scipy import stats  # imported here since it is slow, and only needed for intervals

    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))


def plateau(rows: Sequence[Row], level: float) -> tuple[float, bool | None]:
    """Return the number of epochs that a run spent on a plateau at loss `level`, and True if the run left the plateau.

    The plateau begins with the first row whose loss is at most 5% above `level`. It ends with the next row whose loss
    is more than 5% below `level`, or with the run. If the run was never there, the result is (0, None).
    """
    entered = next((i for i, row in enumerate(rows) if row["loss"] <= level * (1 + PLATEAU_TOLERANCE)), None)
    if entered is None:
        return 0.0, None
    below = (row["epoch"] for row in rows[entered:] if row["loss"] < level * (1 - PLATEAU_TOLERANCE))
    left = next(below, None)
    return (rows[-1]["epoch"] if left is None else left) - rows[entered]["epoch"], left is not None


# Curves: means and quantiles over seeds.


@dataclass(frozen=True)
class Curve:
    """The quantities of one setting along the axes: columns of equal length, with NaN where nothing was measured."""

    setting: str
    columns: dict[str, list[float]]  # step, epoch, ..., seeds, and loss_mean, loss_low (10%), loss_high (90%), ...

    def along(self, axis: str, quantity: str) -> tuple[list[float], list[float], list[float], list[float]]:
        """Return four columns for the points where `quantity` was measured.

        They are the positions on `axis`, and the mean, the 10% and the 90% quantile over seeds.
        """
        rows = zip(self.columns[axis], *(self.columns[f"{quantity}_{p}"] for p in ("mean", "low", "high")), strict=True)
        kept = [row for row in rows if not math.isnan(row[1])]
        x, mean, low, high = zip(*kept, strict=True) if kept else ((), (), (), ())
        return list(x), list(mean), list(low), list(high)


def curve(label: str, runs: Sequence[Sequence[Row]]) -> Curve:
    """Return the curve of a setting, from the rows of its runs with one seed each."""
    columns: dict[str, list[float]] = {}
    for step in sorted({row["step"] for rows in runs for row in rows}):
        same = [row for rows in runs for row in rows if row["step"] == step]
        point = {axis: fmean(row[axis] for row in same) for axis in ("step", "epoch", "megabytes", "seconds")}
        point["seeds"] = len(same)
        for quantity in QUANTITIES:
            values = [row[quantity] for row in same if row.get(quantity) is not None]
            ends = np.quantile(values, (0.1, 0.9)).tolist() if values else [math.nan] * 2
            mean = fmean(values) if values else math.nan
            point |= zip((f"{quantity}_{part}" for part in ("mean", "low", "high")), (mean, *ends), strict=True)
        for name, value in point.items():
            columns.setdefault(name, []).append(value)
    return Curve(label, columns)


def write_curves(curves: Sequence[Curve], path: Path) -> None:
    """Write a CSV file with one line per setting and step, with six digits. Quantities not measured are empty cells."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", *curves[0].columns])
        for one in curves:
            for values in zip(*one.columns.values(), strict=True):
                writer.writerow([one.setting, *(_text(value) for value in values)])


def _text(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}" if float(value).is_integer() else f"{value:.6g}"


def read_curves(path: Path) -> list[Curve]:
    """Read the curves in a file written by `write_curves`. Raises ConfigError if it is invalid."""
    found: dict[str, dict[str, list[float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                columns = found.setdefault(row.pop("setting"), {})
                for name, cell in row.items():
                    columns.setdefault(name, []).append(float(cell) if cell else math.nan)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} does not hold curves: {error}") from None
    return [Curve(setting, columns) for setting, columns in found.items()]


# The summary: estimates over seeds.


def summarise(runs: Sequence[Run[Any]], level: float | None = None) -> Json:
    """Return the summary of a study's runs as plain types: how it was made, and the results of each setting.

    Every estimate also has the values of the single seeds. `level` is the loss of a plateau, if there is one.
    """
    study = json.loads((runs[0].study / "study.json").read_text())
    made = {key: list(dict.fromkeys(one.get(key) for one in study["made"])) for key in study["made"][0]}
    by_name: dict[str, list[Run[Any]]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return {
        "study": study["study"],
        "scale": study["scale"],
        **{key: values[0] if len(values) == 1 else values for key, values in made.items()},
        "settings": [_setting(found, level) for found in by_name.values()],
    }


def _setting(runs: Sequence[Run[Any]], level: float | None) -> Json:
    rows = [run.rows() for run in runs]
    spent = [] if level is None else [plateau(each, level) for each in rows]
    lasts = [each[-1] for each in rows]
    quantities = ("final_loss", "test_loss", "test_accuracy", "grad_norm", "megabytes", "seconds")
    return {
        "setting": runs[0].setting.label,
        "seeds": [run.seed for run in runs],
        "steps": round(lasts[0]["step"]),
        **{q: _estimate([last[q] for last in lasts if last.get(q) is not None]) for q in quantities},
        "plateau_epochs": _estimate([epochs for epochs, _ in spent]),
        "still_on_plateau": sum(left is False for _, left in spent),
        "certificates": [
            {"seed": run.seed, **{key: row[key] for key in _CERTIFIED}}
            for run, each in zip(runs, rows, strict=True)
            for row in each
            if row.get("verdict")
        ],
    }


def _estimate(values: Sequence[float]) -> Json | None:
    return asdict(estimate(values)) if values else None


def by_setting(summary: Json) -> dict[str, Json]:
    """Return a summary's settings, as a dictionary by label."""
    return {entry["setting"]: entry for entry in summary["settings"]}


def paired(one: Json, other: Json, quantity: str, combine: Callable[[float, float], float]) -> Estimate:
    """Combine a quantity of two settings for each seed that both have, and return the mean with its interval.

    Raises ValueError if the settings have no seed in common.
    """
    pairs = [dict(zip(entry["seeds"], entry[quantity]["values"], strict=True)) for entry in (one, other)]
    seeds = [seed for seed in one["seeds"] if seed in other["seeds"]]
    return estimate([combine(pairs[0][seed], pairs[1][seed]) for seed in seeds])


def interval(found: Estimate, spec: str) -> str:
    """Format a mean with its confidence interval, such as "0.12 [0.10, 0.14]"."""
    if found.low is None or found.high is None:
        return format(found.mean, spec)
    return f"{found.mean:{spec}} [{found.low:{spec}}, {found.high:{spec}}]"


def lowest_at(curves: Sequence[Curve], budgets: Sequence[float] = (2.0, 10.0, 50.0, 250.0, 1000.0)) -> list[str]:
    """Return one line for each budget of megabytes: the four settings with the lowest losses at that point.

    Settings that send less in their whole run are omitted, and so are those whose first point is beyond the budget.
    """
    lines = []
    for budget in budgets:
        reached = {}
        for one in curves:
            x, mean, _, _ = one.along("megabytes", "loss")
            before = [loss for at, loss in zip(x, mean, strict=True) if at <= budget]
            if before and x[-1] >= budget:
                reached[one.setting] = before[-1]
        if reached:
            first, *others = sorted(reached, key=lambda setting: reached[setting])
            then = "".join(f"; {setting} {reached[setting]:.4f}" for setting in others[:3])
            lines.append(f"at {budget:g} MB: {first} {reached[first]:.4f}{then}")
    return lines


# What a study leaves: files and a table.


def finish(
    runs: Sequence[Run[Any]],
    draw: Callable[[Sequence[Curve]], Any],
    findings: Callable[[Json, Sequence[Curve]], Sequence[str]] | None = None,
    level: float | None = None,
) -> None:
    """Write summary.json, curves.csv and the figure into a study's folder, and print the summary and the findings.

    `findings` is left out if the runs do not have all settings that it compares.
    """
    folder, summary = runs[0].study, summarise(runs, level)
    labels = {run.name: run.setting.label for run in runs}
    curves = [curve(label, [run.rows() for run in runs if run.name == name]) for name, label in labels.items()]
    write_json(folder / "summary.json", summary)
    write_curves(curves, folder / "curves.csv")
    save_figure(draw(curves), folder)
    print_settings(summary)
    for line in findings(summary, curves) if findings else []:
        print(line)
    print(f"figure: {folder / 'figure-light.svg'}")


def save_figure(figure: Any, folder: Path) -> None:
    """Write figure-light.svg and figure-dark.svg, whose metadata contain the hash of the curves in the figure."""
    charts.save(figure, folder / "figure", source=digest(folder / "curves.csv"))


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def print_settings(summary: Json) -> None:
    """Print a table of a study's settings: means over seeds with 95% intervals."""
    quantities = {
        "final_loss": ("final loss", ".4f"),
        "test_accuracy": ("test accuracy", ".3f"),
        "plateau_epochs": ("epochs on plateau", ".1f"),
        "megabytes": ("MB", ",.1f"),
        "seconds": ("seconds", ",.0f"),
    }
    shown = {key: h for key, h in quantities.items() if any(entry[key] for entry in summary["settings"])}
    table = Table("setting", "seeds", *(heading for heading, _ in shown.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in summary["settings"]:
        values = [_with_spread(entry[key], spec) for key, (_, spec) in shown.items()]
        table.add_row(plain_text(entry["setting"]), str(len(entry["seeds"])), *values)
    table.caption = "mean over seeds ± half of its 95% confidence interval"
    print_table(table)


def _with_spread(found: Json | None, spec: str) -> str:
    if found is None:
        return "-"
    spread = None if found["high"] is None else found["high"] - found["mean"]
    return format(found["mean"], spec) + (f" ± {spread:{spec}}" if spread else "")
