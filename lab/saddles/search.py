"""The largest learning rate at which every seed settles, for each method, kind of saddle and dimension.

Rates are powers of two. So all methods are compared at the same accuracy at the minimum, the
only normalisation of rates that does not prefer one of them. Finished runs are rows of a file and are not repeated.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple
from pathlib import Path

from lab.bench.rows_file import add_rows, read_rows
from lab.saddles.escape import LIMIT, Row, run
from lab.saddles.methods import METHODS
from lab.saddles.saddle import KINDS, Saddle

SEEDS = range(5)
SIDES = (4, 16, 64, 256)  # n, where the norm of the noise is 1
SMALL_SIDES = (4, 8, 16)  # where each coordinate has the same noise
PLAIN, COMPRESSED = ("SGD", "AdamW", "Muon"), ("RandomK 1/16", "TopK 1/16")  # others: with noise of norm 1 only
LARGEST, START, SMALLEST = 0, 3, 14  # indices of the rates 2^-index, and where the smallest dimension's search begins

Cell = tuple[str, str, int]  # method, kind, n


class Rows:
    """The finished runs, in a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.rows = path, read_rows(path, _parsed, "run")

    def get(self, method: str, saddle: Saddle, lr: float) -> Row:
        """Return a run's row; run it if the file has none."""
        for row in self.rows:
            if astuple(row)[:5] == (method, saddle.kind, saddle.n, lr, saddle.seed):
                return row
        row = run(method, saddle, lr)
        add_rows(self.path, [asdict(row)])
        self.rows.append(row)
        print(row, flush=True)
        return row

    def of(self, cell: Cell) -> list[Row]:
        """Return the rows of all rates."""
        return [r for r in self.rows if (r.method, r.kind, r.n) == cell]

    def best(self, cell: Cell) -> list[Row]:
        """Return the rows of the largest rate at which every seed settled; [] if there is none."""
        found = [r for r in self.of(cell) if r.settled]
        rates = {r.lr for r in found if len({x.seed for x in found if x.lr == r.lr}) == len(SEEDS)}
        return [r for r in found if r.lr == max(rates)] if rates else []

    def stays(self, cell: Cell) -> bool:
        """Return True if a run of the cell is still at the saddle at the limit, and no rate is found."""
        return any(r.steps == LIMIT for r in self.of(cell)) and not self.best(cell)


def _parsed(line: Mapping[str, str]) -> Row:
    numbers = int(line["n"]), float(line["lr"]), int(line["seed"]), int(line["steps"])
    return Row(line["method"], line["kind"], *numbers, settled=line["settled"] == "True")


def measure(rows: Rows, cell: Cell) -> None:
    """Search the largest rate at which every seed settles, from the rate of the next smaller dimension."""
    method, kind, n = cell
    smaller = [rows.best((method, kind, side)) for side in sides(kind) if side < n]
    start = next((_index(found[0].lr) for found in reversed(smaller) if found), START)

    def settles(index: int) -> bool | None:
        """Return True if every seed settles, None if one stays at the saddle: a smaller rate stays longer."""
        for seed in SEEDS:
            row = rows.get(method, Saddle(n, kind, seed), 2.0**-index)
            if not row.settled:
                return None if row.steps == LIMIT else False
        return True

    index = start
    if settles(index):
        while index > LARGEST and settles(index - 1):
            index -= 1
        return
    while index < SMALLEST and settles(index) is False:
        index += 1


def _index(lr: float) -> int:
    return round(-math.log2(lr))


def sides(kind: str) -> tuple[int, ...]:
    """Return the sides n of a kind of saddle."""
    return SIDES if KINDS[kind].per_coordinate is None else SMALL_SIDES


def cells() -> Iterator[Cell]:
    """Yield every measurement: plain optimizers first, and small dimensions first."""
    first, *others = KINDS
    yield from ((name, kind, n) for kind in KINDS for n in sides(kind) for name in PLAIN)
    yield from ((name, first, n) for name in METHODS if name not in PLAIN for n in sides(first))
    yield from ((name, kind, n) for kind in others for n in sides(kind) for name in COMPRESSED)
