"""The charts of measured times and bytes in docs/pictures, drawn from rows committed in experiments/.

`lab.docs.pictures` writes them for light and dark pages.
"""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.docs.canvas import Canvas
from lab.race.tables import LINKS, ROWS, SIZES, gaps, reached, searched, unreached
from lab.race.train import rows
from lab.rows import read_rows

ROOT = Path(__file__).parents[2]
RACE = ROOT / "experiments" / "race"
_CURVE = 50  # steps between two losses of a curve in experiments/muon


@dataclass(frozen=True)
class Plot:
    """A chart on a canvas, with a logarithmic x axis and a linear y axis."""

    canvas: Canvas
    xs: Sequence[float]  # labelled values of the x axis, in ascending order
    ys: Sequence[float]
    x_limits: Sequence[float] = ()  # the ends of the x axis; empty: the ends of `xs`
    y_limits: Sequence[float] = ()
    ground: float = 372
    left: float = 52
    right: float = 516
    top: float = 72

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the position on the canvas of the point with the values x and y."""
        xs, ys = self.x_limits or self.xs, self.y_limits or self.ys
        right = math.log(x / xs[0]) / math.log(xs[-1] / xs[0])
        up = (y - ys[0]) / (ys[-1] - ys[0])
        return self.left + right * (self.right - self.left), self.ground - up * (self.ground - self.top)

    def frame(self, title: str, y_name: str, x_name: str) -> None:
        """Draw the two axes with their labels and names, and the title."""
        canvas, muted = self.canvas, self.canvas.theme.muted
        canvas.text(4, 14, title, weight="bold")
        canvas.text(4, 44, y_name, muted)
        for y in self.ys:
            height = self.at(self.xs[0], y)[1]
            canvas.axes.plot((self.left, self.right), (height, height), color=canvas.theme.level, lw=1)
            canvas.text(self.left - 8, height, f"{y:g}", muted, ha="right")
        for x in self.xs:
            canvas.text(self.at(x, self.ys[0])[0], self.ground + 18, f"{x:,g}", muted, ha="center")
        canvas.text((self.left + self.right) / 2, self.ground + 46, x_name, muted, ha="center")

    def curve(self, found: Mapping[float, Sequence[float]], color: str, **options: object) -> None:
        """Draw a curve of means over seeds, with a band for their range. `found` has the seeds' values by x."""
        low, high = ([self.at(x, end(ys)) for x, ys in found.items()] for end in (min, max))
        self.canvas.axes.fill(*zip(*low, *reversed(high), strict=True), color=color, alpha=0.2, lw=0)
        means = [self.at(x, statistics.fmean(ys)) for x, ys in found.items()]
        style = {"color": color, "lw": 3, "marker": "o", "ms": 7, **options}
        self.canvas.axes.plot(*zip(*means, strict=True), **style)


def losses(canvas: Canvas) -> None:
    """Draw the validation loss of a GPT against the megabytes that each of two workers has sent, for five methods."""
    theme = canvas.theme
    # For each method of the table: its name in the chart, color, position of the name, and letters per line.
    methods = {
        "AdamW, dense, beta1 0.8": ("DDP, AdamW", theme.muted, (420, 96), 20),
        "Muon, dense": ("DDP, Muon", theme.ink, (392, 350), 20),
        "Muon, DiLoCo 32, 0.5": ("DiLoCo, Muon", theme.kept, (176, 96), 20),
        "AdamW, local 8, Sign, mean momentum 0.5": ("LocalUpdates, AdamW", theme.second, (62, 46), 30),
        "Muon, local 8, Sign": ("LocalUpdates, Muon", theme.first, (46, 342), 14),
    }
    plot = Plot(canvas, (1, 10, 100, 1000), (1.5, 2.0, 2.5, 3.0), (0.8, 4000), (1.3, 3.1), left=44, right=552, top=60)
    plot.frame("Validation loss of a small GPT, two workers", "", "megabytes that a worker has sent")

    # Draw the curves, which are means over seeds, and write their names.
    every = read_rows(ROOT / "experiments" / "muon" / "gpt-w2.csv", dict, "training")
    for method, (name, color, at, wrap) in methods.items():
        # The rows, one for each seed, at the learning rate with the lowest loss of seed 0.
        mine = [row for row in every if row["method"] == method]
        first = min((row for row in mine if row["seed"] == "0"), key=lambda row: float(row["validation_loss"]))
        best = [row for row in mine if row["rate"] == first["rate"]]
        curves = [[float(loss) for loss in row["curve"].split()] for row in best]
        points = [
            plot.at(_CURVE * (i + 1) * float(best[0]["kB_a_step"]) / 1e3, statistics.fmean(found))
            for i, found in enumerate(zip(*curves, strict=True))
        ]
        canvas.axes.plot(*zip(*points, strict=True), color=color, lw=3)
        canvas.text(*at, name, color, wrap, weight="bold")


def times(canvas: Canvas) -> None:
    """Draw the seconds to the target loss against the link's rate, with two workers.

    One curve is the best of packsaddle's methods, the second one the best of all remaining methods.
    """
    plot = Plot(canvas, LINKS, (0, 25, 50, 75, 100))
    plot.frame("Seconds to a validation loss of 1.6", "two workers, Muon and AdamW inside", "Mbit/s in each direction")
    plot.curve(best(2, is_ours=False), canvas.theme.second)
    plot.curve(best(2, is_ours=True), canvas.theme.first)
    canvas.text(180, 96, "local SGD in 16 bits, best period", canvas.theme.second, weight="bold")
    canvas.text(80, 226, "LocalUpdates, one or two bits", canvas.theme.first, weight="bold")


def best(workers: int, *, is_ours: bool) -> dict[float, list[float]]:
    """Return, by link, the seconds to the target of three seeds with the fastest method.

    With `is_ours` it is the fastest of packsaddle's methods, otherwise the fastest of all remaining methods.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    for run in read_rows(RACE / "target" / "runs.csv", dict, "training"):
        mine = int(run["workers"]), float(run["target"]), re.match(r"Muon, local \d", run["method"]) is not None
        if mine == (workers, 1.6, is_ours):
            total = sum(float(run[name]) for name in ("start_s", "train_s", "flush_s"))
            seconds.setdefault((run["rate"], run["method"]), []).append(total)
    whole = {link: [s for (rate, _), s in seconds.items() if rate == str(link) and len(s) == 3] for link in LINKS}
    return {link: min(found, key=statistics.fmean) for link, found in whole.items()}


def speed_ups(canvas: Canvas) -> None:
    """Draw the speed-up of two and four workers over one machine alone, against the link's rate.

    The workers train by nanoGPT's recipe until they reach the loss of one machine alone.
    """
    plot, theme = Plot(canvas, LINKS, (0, 0.5, 1, 1.5, 2, 2.5, 3)), canvas.theme
    plot.frame("Speed-up over one machine alone", "nanoGPT on a CPU, to its loss", "Mbit/s in each direction")
    found = reached(searched(rows(ROWS)))
    for key, words, at, color, style in (
        ((4, "local, agreement"), "LocalUpdates, 4 workers", (70, 2.38), theme.first, "-"),
        ((2, "local, overlap"), "2 workers, overlap=2", (100, 1.78), theme.second, "-"),
        ((2, "dense"), "DDP, 2 workers", (12, 0.35), theme.muted, "--"),
    ):
        plot.curve({link: [one.speed_up(link) for one in found[key]] for link in LINKS}, color, linestyle=style)
        canvas.text(*plot.at(*at), words, color, weight="bold")
    canvas.axes.plot(*zip(plot.at(LINKS[0], 1), plot.at(LINKS[-1], 1), strict=True), color=theme.ink, lw=2)
    canvas.text(*plot.at(12, 0.86), "one machine alone", weight="bold")


def workers(canvas: Canvas) -> None:
    """Draw the speed-up over one machine alone at 10 Mbit/s, against the number of workers.

    Hollow points are upper limits: these trainings end above the loss of one machine alone.
    """
    plot, theme = Plot(canvas, (1, 2, 4, 8, 16), (0, 1, 2, 3)), canvas.theme
    plot.frame("Speed-up over one machine alone", "nanoGPT on a CPU, 10 Mbit/s", "workers")
    best = searched(rows(ROWS))
    found, above = reached(best), {(one.workers, one.method): one for one, _ in unreached(best)}
    for method, words, at, color in (
        ("local, agreement", "LocalUpdates, one bit", (1.3, 2.5), theme.first),
        ("local SGD 128, 16 bits", "local SGD, 16 bits", (2.5, 1.2), theme.second),
        ("DiLoCo 32, 16 bits", "DiLoCo, 16 bits", (2.3, 0.7), theme.kept),
    ):
        points: dict[float, list[float]] = {1: [1.0]}
        for count in plot.xs[1:]:
            key = int(count), method
            if key in found:
                points[count] = [one.speed_up(10) for one in found[key]]
            elif key in above:
                points[count] = [above[key].speed_up(10)]
                canvas.dot(*plot.at(count, points[count][0]), theme.page, 2)
        plot.curve(points, color)
        canvas.text(*plot.at(*at), words, color, weight="bold")


def sizes(canvas: Canvas) -> None:
    """Draw the loss of four workers minus that of dense training, against the size of the network."""
    plot = Plot(canvas, (0.05, 0.1, 0.2, 0.4, 0.8), (-0.04, 0, 0.04, 0.08), y_limits=(-0.05, 0.1), left=60)
    theme = canvas.theme
    plot.frame("Loss minus that of dense training", "nanoGPT, four workers, AdamW", "million parameters")
    every = rows(SIZES)
    for method, words, at, color in (
        ("local, agreement", "one bit every 8 steps", (0.07, 0.085), theme.first),
        ("local 4, two bits, agreement", "two bits every 4 steps", (0.12, -0.03), theme.second),
    ):
        plot.curve({size.parameters / 1e6: size.gaps for size in gaps(every, method)}, color)
        canvas.text(*plot.at(*at), words, color, weight="bold")
