"""Functions that read the rows of the simulated trainings in experiments/*/*.csv."""

import csv
from collections.abc import Sequence
from functools import cache
from pathlib import Path

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
