"""A search over learning rates: one grid and schedule for all methods, more seeds at each method's best rate, a table.

Each finished run is a row of a CSV file, and runs in the file are not repeated. `search` makes every method and rate
with seed 0, `seeds` makes seeds 1 and 2 at each method's best rate, `table` prints the results, and `figure` draws loss
against bytes.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.bench.origin import Origin
from lab.bench.rows_file import add_rows
from lab.race.recipe import share_of_peak

WARM_UP = 50
Job = tuple[str, float, int]  # method, rate, seed


def rate_at(step: int, steps: int) -> float:
    """Return the fraction of the peak rate at a step: linear warm-up, then a cosine to a tenth."""
    return share_of_peak(step, WARM_UP, steps)


def append(out: Path, row: dict[str, object], text: str = "") -> None:
    """Add a run to the file with its origin, and print it; `text`: the hash of its training text, if recorded."""
    add_rows(out, [row | asdict(Origin.here(text=text))])
    print(row, flush=True)


def climb(quality: Callable[[int], Any], at: int, grid: range) -> int:
    """Return a place in a grid of rates with worse neighbors, searched from `at`; the less `quality` is, the better."""
    worse = set[int]()
    while neighbors := [i for i in (at - 1, at + 1) if i not in worse and i in grid]:
        there = neighbors[0]
        if quality(there) < quality(at):
            worse.add(at)
            at = there
        else:
            worse.add(there)
    return at


@dataclass(frozen=True)
class RateSearch:
    """A search over `methods`, by name, and a grid of rates; `sent` is the column of bytes, with its heading."""

    description: str
    methods: Iterable[str]
    rates: tuple[float, ...]
    sent: tuple[str, str]
    out: Path
    steps: int
    colours: tuple[tuple[str, str], ...] = ()  # by prefix of the method's name

    def main(
        self, make: Callable[[list[Job], argparse.Namespace], None], add: Callable[[argparse.ArgumentParser], object]
    ) -> None:
        """Run the command line: `make` makes the runs, `add` adds further options to the parser."""
        parser = argparse.ArgumentParser(description=self.description.split("\n")[0])
        parser.add_argument("command", choices=("search", "seeds", "table", "figure"))
        parser.add_argument("--out", type=Path, default=self.out)
        parser.add_argument("--methods", nargs="+", choices=list(self.methods), default=list(self.methods))
        parser.add_argument("--rates", nargs="+", type=float, help="by default all, and for seeds each method's best")
        parser.add_argument("--steps", type=int, default=self.steps)
        add(parser)
        options = parser.parse_args()
        rows = list(csv.DictReader(options.out.open())) if options.out.exists() else []
        if options.command == "table":
            print(self.table(rows))
            return
        if options.command == "figure":
            self.draw([row for row in rows if row["method"] in options.methods], options.out.with_name("figure.png"))
            return
        if options.command == "search":
            jobs = [(method, rate, 0) for method in options.methods for rate in options.rates or self.rates]
        else:
            rates = {method: options.rates or [best_rate(rows, method)] for method in options.methods}
            jobs = [(method, rate, seed) for method in options.methods for rate in rates[method] for seed in (1, 2)]
        same = [row for row in rows if int(row.get("steps") or options.steps) == options.steps]
        done = {(row["method"], float(row["rate"]), int(row["seed"])) for row in same}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        make([job for job in jobs if job not in done], options)

    def table(self, rows: list[dict[str, str]]) -> str:
        """Return the Markdown table: seed 0 by rate, and mean and range over seeds at the rate with the lowest mean."""
        column, heading = self.sent
        lines = [
            f"| method | {heading} | "
            + " | ".join(f"{rate:g}" for rate in self.rates)
            + " | best rate: mean, range, seeds |",
            "| --- " * (len(self.rates) + 3) + "|",
        ]
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            cells = {float(row["rate"]): f"{float(row['validation_loss']):.3f}" for row in mine if row["seed"] == "0"}
            by_rate = [cells.get(rate, "-") for rate in self.rates]
            lines.append(f"| {method} | {mine[0][column]} | {' | '.join(by_rate)} | {self._best(mine)} |")
        return "\n".join(lines)

    def _best(self, rows: list[dict[str, str]]) -> str:
        """Return the best rate, with mean, range and number of seeds."""
        best, found = self._losses(rows)
        return f"{best:g}: {statistics.fmean(found):.3f}, {min(found):.3f} to {max(found):.3f}, {len(found)}"

    def _losses(self, rows: list[dict[str, str]]) -> tuple[float, list[float]]:
        """Return the rate of the lowest mean loss among those with the most seeds, and the losses of its seeds."""
        losses = {r: [float(row["validation_loss"]) for row in rows if float(row["rate"]) == r] for r in self.rates}
        most = max(map(len, losses.values()))
        best = min(
            (rate for rate in self.rates if len(losses[rate]) == most), key=lambda r: statistics.fmean(losses[r])
        )
        return best, losses[best]

    def draw(self, rows: list[dict[str, str]], path: Path) -> None:
        """Draw mean and range of the loss over seeds, at each method's best rate, against the bytes of a worker."""
        import matplotlib.pyplot as plt

        plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
        figure, axes = plt.subplots(figsize=(8.5, 4.2), layout="constrained")
        points = {}
        for method in dict.fromkeys(row["method"] for row in rows):
            mine = [row for row in rows if row["method"] == method]
            points[method] = float(mine[0][self.sent[0]]), self._losses(mine)[1]
        means = {method: (sent, statistics.fmean(losses)) for method, (sent, losses) in points.items()}
        for method, (sent, losses) in points.items():
            mean = means[method][1]
            colour = next((c for start, c in self.colours if method.startswith(start)), "0.35")
            spread = [[mean - min(losses)], [max(losses) - mean]]
            axes.errorbar([sent], [mean], spread, fmt="o", color=colour, capsize=3)
            # The name is above its point, or below if another point is there.
            others = [point for name, point in means.items() if name != method]
            crowded = any(abs(math.log(x / sent)) < 1 and 0 <= y - mean < 0.1 for x, y in others)
            place = {"xytext": (0, -13 if crowded else 11), "textcoords": "offset points"}
            axes.annotate(method, (sent, mean), **place, ha="center", va="center", color=colour)
        axes.set_xscale("log")
        axes.set_xlabel("kB that a worker sends in a step")
        axes.set_ylabel("validation loss at equal tokens")
        axes.grid(alpha=0.25)
        axes.margins(x=0.2)
        figure.savefig(path, dpi=130)


def best_rate(rows: list[dict[str, str]], method: str) -> float:
    """Return the rate with the lowest validation loss of seed 0."""
    mine = [row for row in rows if row["method"] == method and row["seed"] == "0"]
    return float(min(mine, key=lambda row: float(row["validation_loss"]))["rate"])
