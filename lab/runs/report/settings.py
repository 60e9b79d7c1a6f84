"""Means and confidence intervals over the seeds of a setting, i.e. a group of runs that differ only in their seed."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lab.runs.run_folder import Run

Axis = Literal["step", "epoch", "megabytes", "seconds", "rounds"]


@dataclass(frozen=True)
class Setting:
    """Runs of one configuration, one per seed; they may differ only in `seed` and `certify`."""

    label: str
    runs: tuple[Run, ...]

    @property
    def config(self) -> dict[str, Any]:
        return self.runs[0].config

    @property
    def seeds(self) -> list[int]:
        return [int(run.config.get("seed", 0)) for run in self.runs]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with a 95% confidence interval (Student's t); its ends are None for a single seed."""

    mean: float
    low: float | None
    high: float | None
    values: tuple[float, ...]


def settings(runs: Iterable[Run]) -> list[Setting]:
    """Group runs by configuration, in order of first appearance. Different settings with equal labels are numbered.

    Repeated runs of one seed are put into separate settings, since duplicates would make intervals too narrow.
    """
    groups: dict[tuple[str, int], list[Run]] = {}
    times = Counter[tuple[str, int]]()
    for run in runs:
        identifying = {k: v for k, v in run.config.items() if k not in ("seed", "certify")}
        identity, seed = json.dumps(identifying, sort_keys=True), run.config.get("seed", 0)
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


def position(line: dict[str, Any], axis: Axis) -> float:
    """Return the position of a line of metrics on an axis; NaN if it was not recorded.

    On the axis of megabytes it is what a worker has sent. A single worker sends nothing, so its messages are counted.
    """
    if axis == "megabytes":
        return float(line.get("sent") or line.get("payload") or 0) / 1e6
    found = line.get(axis)
    return math.nan if found is None else float(found)


def estimate(values: Sequence[float]) -> Estimate:
    """Return the mean of values and its 95% confidence interval. Raises ValueError if there are no values.

    The ends of the interval are None for a single value and for non-finite values.
    """
    if not values:
        raise ValueError("values must hold at least one number")
    mean = sum(values) / len(values)
    if len(values) == 1 or not math.isfinite(mean):
        return Estimate(mean, None, None, tuple(values))
    from scipy import stats  # imported here since it is slow, and only needed for intervals

    half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return Estimate(mean, mean - half, mean + half, tuple(values))
