"""Functions that read committed rows, among them those of races whose commands are of commit 92cf0ab5.

experiments/muon has simulated trainings, experiments/race/curves.csv trainings on local processes, steps.csv step
times on links, and experiments/race/target trainings until a loss by the clock.
"""

import csv
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
Row = dict[str, str]


@cache
def read(path: Path) -> tuple[Row, ...]:
    with path.open(newline="") as file:
        return tuple(csv.DictReader(file))


def at_best_rate(rows: Sequence[Row], method: str) -> tuple[list[float], float]:
    """Return a method's validation losses, one per seed, and its kB per step, at the best learning rate for seed 0."""
    mine = [row for row in rows if row["method"] == method]
    first = min((row for row in mine if row["seed"] == "0"), key=lambda row: float(row["validation_loss"]))
    losses = [float(row["validation_loss"]) for row in mine if row["rate"] == first["rate"]]
    return losses, float(first["kB_a_step"])


@cache
def raced(method: str) -> tuple[float, float, float]:
    """Return the mean final loss, the kB a step, and the least peak memory in MB, of 600 steps by two workers.

    They are at the rate with the lowest mean loss, among the rates with the most seeds.
    """
    by_rate: dict[str, list[Row]] = {}
    for row in read(EXPERIMENTS / "race" / "curves.csv"):
        name = " ".join(word for word in row["contender"].split() if not word.startswith(("lr=", "steps=")))
        if (name, row["workers"], row["steps"]) == (method, "2", "600"):
            by_rate.setdefault(row["lr"], []).append(row)
    most = max(map(len, by_rate.values()))
    best = min((rows for rows in by_rate.values() if len(rows) == most), key=lambda rows: fmean(map(_final, rows)))
    return fmean(map(_final, best)), float(best[0]["sent"]) / 1000, min(float(row["peak_mb"]) for row in best)


def _final(row: Row) -> float:
    return float(row["losses"].split()[-1])


def share_of_computing(rows: Sequence[Row], method: str, mbit: float) -> float:
    """Return the time of a step alone over that of a method's step, on a link of `mbit` Mbit/s."""
    times = {row["contender"]: float(row["ms"]) for row in rows if float(row["up"]) == float(row["down"]) == mbit}
    return min(1.0, times["alone"] / times[method])


def steps_to(losses: Sequence[float], target: float) -> float:
    """Return the step at which losses, measured every 50 steps, reach the target, on straight lines; inf if never."""
    before, step = math.inf, 0.0
    for loss in losses:
        if loss <= target:
            return step + 50 * (1.0 if before == math.inf else (before - target) / (before - loss))
        before, step = loss, step + 50
    return math.inf


def dense_steps(inner: str, workers: int, target: float) -> float:
    """Return the simulated steps of dense training to the target, a mean over seeds at the best rate for seed 0."""
    method = "Muon, dense" if inner == "Muon" else "AdamW, dense, beta1 0.8"
    steps: dict[str, dict[str, float]] = {}
    for row in read(EXPERIMENTS / "muon" / f"gpt-w{workers}.csv"):
        if row["method"] == method:
            steps.setdefault(row["rate"], {})[row["seed"]] = steps_to([*map(float, row["curve"].split())], target)
    return fmean(min((by_seed for by_seed in steps.values() if "0" in by_seed), key=lambda each: each["0"]).values())


def seconds_of(run: Row) -> float:
    """Return the seconds of a training by the clock: start, steps and flush."""
    return sum(float(run[name]) for name in ("start_s", "train_s", "flush_s"))
