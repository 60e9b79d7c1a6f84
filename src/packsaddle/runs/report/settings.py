"""Runs that differ in their seed alone, as one setting: means, quantiles and confidence intervals over seeds."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packsaddle.runs.run_folder import Run

Axis = Literal["step", "epoch", "megabytes", "seconds", "rounds"]
QUANTILES = (0.1, 0.9)


@dataclass(frozen=True)
class Setting:
    """Runs of one configuration, one per seed; the seed and who certifies are all that may differ."""

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the first run."""
        return self.runs[0].config

    @property
    def seeds(self) -> list[int]:
        return [int(run.config.get("seed", 0)) for run in self.runs]


@dataclass(frozen=True)
class Band:
    """A quantity over seeds along an axis; lists of one length. With one seed the band is a line."""

    x: list[float]
    mean: list[float]
    low: list[float]  # 10% quantile
    high: list[float]  # 90% quantile
    seeds: list[int]  # how many runs got there


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with a 95% confidence interval (Student's t); without one if there is a single seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def settings(runs: Iterable[Run]) -> list[Setting]:
    """Group runs by configuration, in order of first appearance; equal labels of different settings are numbered.

    A further run of one seed, or a copy of it, would make a mean seem surer than it is: it is of another setting.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    times = Counter[tuple[str, int]]()
    for run in runs:
        identity, seed = _identity(run), run.config.get("seed", 0)
        groups.setdefault((identity, times[identity, seed]), []).append(run)
        times[identity, seed] += 1
    taken: dict[str, int] = {}
    found = []
    for group in groups.values():
        label = group[0].label
        taken[label] = taken.get(label, 0) + 1
        name = label if taken[label] == 1 else f"{label} ({taken[label]})"
        found.append(Setting(name, tuple(sorted(group, key=lambda run: run.config.get("seed", 0)))))
    return found


def _identity(run: Run) -> str:
    """Return the keys that are equal within a setting: all but the seed, and certificates, which change no iterate."""
    return json.dumps({k: v for k, v in run.config.items() if k not in ("seed", "certify")}, sort_keys=True)


def band(setting: Setting, quantity: str, axis: Axis) -> Band | None:
    """Return a quantity of the metrics along an axis; None if no line has it.

    Lines are matched by step. Bytes and seconds on the axis are means over the seeds that got there.
    """
    by_step: dict[int, list[dict[str, Any]]] = {}
    for run in setting.runs:
        for line in run.metrics:
            if line.get(quantity) is not None:
                by_step.setdefault(int(line["step"]), []).append(line)
    if not by_step:
        return None
    steps = sorted(by_step)
    xs = [_mean([position(line, axis) for line in by_step[step]]) for step in steps]
    values = [[float(line[quantity]) for line in by_step[step]] for step in steps]
    low, high = ([_quantile(v, q) for v in values] for q in QUANTILES)
    return Band(xs, [_mean(v) for v in values], low, high, [len(v) for v in values])


def position(line: dict[str, Any], axis: Axis) -> float:
    """Return a line's position on an axis; megabytes are those a worker sent (with one: of its messages).

    Rounds are NaN where they were not counted.
    """
    if axis == "megabytes":
        return float(line.get("sent") or line.get("payload") or 0) / 1e6
    found = line.get("rounds") if axis == "rounds" else line[axis]
    return math.nan if found is None else float(found)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _quantile(values: Sequence[float], q: float) -> float:
    """numpy.quantile's answer, undefined where a value is; much sooner for a few values."""
    if any(not math.isfinite(v) for v in values):
        return float("nan")
    ordered, place = sorted(values), q * (len(values) - 1)
    below = int(place)
    return ordered[below] + (place - below) * (ordered[min(below + 1, len(ordered) - 1)] - ordered[below])


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean and its confidence interval (none if a value diverged). Raises ValueError without values."""
    if not values:
        raise ValueError("values must hold at least one number")
    mean = _mean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, tuple(values))
    from scipy import stats  # slow to import, and only intervals need it

    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))
