"""Tables of the race's rows: losses, speed-ups over one machine alone, and gaps by size.

A speed-up compares the times in which W workers and one machine alone reach the loss of the latter after 2,000 steps.
The length at which W workers reach it is interpolated in the logarithm of the steps. The times are computed: the steps,
each of 55 ms, and then the bytes over the rate of the link, less what passes during the steps of `overlap`.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from scipy.stats import linregress, t

from lab.race.gpt import BATCH, GPT, RATE, STEPS, WARM_UP, Network
from lab.race.methods import METHODS

FOLDER = Path(__file__).parents[2] / "experiments" / "nanogpt"
ROWS, CLOCKED, SIZES = FOLDER / "runs.csv", FOLDER / "clock.csv", FOLDER / "sizes.csv"
LINKS = (10, 50, 200, 1000)  # rates of links, in Mbit/s
STEP_TIME = 0.055  # seconds of a step of 12 windows, if the worker has a core to itself
CHARACTERS = 65  # of nanoGPT's text


def untuned(found: Sequence[Mapping[str, str]], steps: int | None = None) -> list[Mapping[str, str]]:
    """Return the rows of the recipe's own rate, warm-up and batch, with `steps` only those of this length."""
    own = {"rate": RATE, "warm_up": WARM_UP, "batch": BATCH} | ({} if steps is None else {"steps": steps})
    return [row for row in found if all(float(row[key]) == value for key, value in own.items())]


def searched(found: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Return the row of each method, number of workers, length and seed at the rate with the lowest loss.

    Rows with the recipe's own rate are left out, since it is not searched for, and those with another batch.
    """
    others = [row for row in found if float(row["rate"]) != RATE and int(row["batch"]) == BATCH]
    return list(_best(others, "method", "workers", "steps", "seed").values())


def _best(found: Sequence[Mapping[str, str]], *names: str) -> dict[tuple[str, ...], Mapping[str, str]]:
    """Return the row with the lowest loss for each combination of values in the columns `names`."""
    by_loss = sorted(found, key=lambda row: -float(row["loss"]))
    return {tuple(row[name] for name in names): row for row in by_loss}


def table(found: Sequence[Mapping[str, str]]) -> str:
    """Return the Markdown table of trainings: mean loss over seeds, its range, and megabytes sent by a worker.

    A method has a line for each number of workers and of steps.
    """
    lines = list[list[str]]()
    for workers, name in _settings(found):
        mine = _of(found, workers, name)
        for steps in sorted({int(row["steps"]) for row in mine}):
            of_seeds = [row for row in mine if int(row["steps"]) == steps]
            rates = ", ".join(sorted({f"{float(row['rate']):g}" for row in of_seeds}))
            losses, sent = [float(row["loss"]) for row in of_seeds], f"{int(of_seeds[0]['sent']) / 1e6:,.4g}"
            lines.append([str(workers), name, f"{steps:,}", rates, str(len(losses)), spread(losses, 3), sent])
    return _markdown(["workers", "method", "steps", "rate", "seeds", "loss", "MB"], lines)


@dataclass(frozen=True)
class Trial:
    """A training of several workers: its length in steps, and the number of bytes that each worker sends."""

    workers: int
    method: str
    rate: float  # the highest learning rate
    steps: float
    sent: float

    def speed_up(self, mbit: float) -> float:
        """Return the time of one machine alone, divided by the time of this training on a link of `mbit` Mbit/s.

        The time of an exchange counts only as far as it exceeds the time of the steps that overlap with it.
        """
        how = METHODS.get(self.method, METHODS["dense"])  # rows of earlier commits have other methods too
        hidden = how.overlap * STEP_TIME * self.steps / how.every
        exchanges = 8 * self.sent / (mbit * 1e6)
        return STEPS * STEP_TIME / (self.steps * STEP_TIME + max(0.0, exchanges - hidden))


def speed_ups(found: Sequence[Mapping[str, str]], links: Sequence[int] = LINKS) -> str:
    """Return the Markdown table of the trainings of `reached`: their steps, and their speed-up over one machine alone.

    They are means over seeds, with the range of the speed-ups if there are several. `links` are the rates of the links
    in Mbit/s.
    """
    lines = list[list[str]]()
    for (workers, method), of_seeds in reached(found).items():
        rates = ", ".join(f"{rate:g}" for rate in sorted({one.rate for one in of_seeds}))
        steps = statistics.fmean(one.steps for one in of_seeds)
        cells = [str(workers), method, rates, str(len(of_seeds)), f"{steps:,.0f}"]
        lines.append(cells + [spread([one.speed_up(mbit) for one in of_seeds]) for mbit in links])
    return _markdown(["workers", "method", "rate", "seeds", "steps", *(f"{mbit:,} Mbit/s" for mbit in links)], lines)


def limits(found: Sequence[Mapping[str, str]], links: Sequence[int] = LINKS) -> str:
    """Return the Markdown table of the trainings of `unreached`, with upper limits on the methods' speed-ups.

    The columns are like those of `speed_ups`, with the losses.
    """
    lines = list[list[str]]()
    for one, losses in unreached(found):
        cells = [str(one.workers), one.method, f"{one.rate:g}", str(len(losses)), f"{one.steps:,.0f}"]
        lines.append([*cells, spread(losses, 3), *(f"{one.speed_up(mbit):.2f}" for mbit in links)])
    heads = ["workers", "method", "rate", "seeds", "steps", "loss", *(f"{mbit:,} Mbit/s" for mbit in links)]
    return _markdown(heads, lines)


def _markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


def spread(numbers: Sequence[float], digits: int = 2) -> str:
    """Return the mean of some numbers as text, with their range if it is visible in `digits` after the point."""
    low, mean, high = (f"{n:.{digits}f}" for n in (min(numbers), statistics.fmean(numbers), max(numbers)))
    return mean + (f" ({low} to {high})" if low != high else "")


def reached(found: Sequence[Mapping[str, str]]) -> dict[tuple[int, str], list[Trial]]:
    """Return the trainings that end at the same loss as one machine alone with the same seed, by workers and method.

    The length of a training is interpolated, in the logarithm of the steps, between a training with a higher and one
    with a lower loss. Seeds without two such trainings are left out.
    """
    trainings: dict[tuple[int, str], list[Trial]] = {}
    for (workers, name), (seed, target) in product(_settings(found), _targets(found).items()):
        seen = {int(row["steps"]): row for row in _of(found, workers, name) if row["seed"] == seed}
        longer = [n for n in sorted(seen) if float(seen[n]["loss"]) <= target]
        if workers > 1 and longer and longer[0] > min(seen):
            low, high = max(n for n in seen if n < longer[0]), longer[0]
            above, below = (float(seen[n]["loss"]) - target for n in (low, high))
            steps = math.exp(math.log(low) + math.log(high / low) * above / (above - below))
            one = Trial(workers, name, float(seen[high]["rate"]), steps, int(seen[high]["sent"]) * steps / high)
            trainings.setdefault((workers, name), []).append(one)
    return trainings


def unreached(found: Sequence[Mapping[str, str]]) -> Iterator[tuple[Trial, list[float]]]:
    """Yield each method's longest training, and its losses by seed, if all are above those of one machine alone.

    The method needs more steps than this training has, so the speed-up of the training is an upper limit.
    """
    targets = _targets(found)
    for workers, name in _settings(found):
        longest = max(int(row["steps"]) for row in _of(found, workers, name))
        last = _of(found, workers, name, longest)
        if workers > 1 and all(float(row["loss"]) > targets.get(row["seed"], math.inf) for row in last):
            trial = Trial(workers, name, float(last[0]["rate"]), longest, int(last[0]["sent"]))
            yield trial, [float(row["loss"]) for row in last]


def _targets(found: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Return the loss of one machine alone, by seed."""
    return {row["seed"]: float(row["loss"]) for row in _of(found, 1, "dense", STEPS)}


def _of(
    found: Sequence[Mapping[str, str]], workers: int, name: str, steps: int | None = None
) -> list[Mapping[str, str]]:
    """Return the rows of one method and number of workers, ordered by seed.

    `steps` selects trainings of this length; None selects all.
    """
    mine = [row for row in found if row["method"] == name and int(row["workers"]) == workers]
    return sorted((row for row in mine if steps in (None, int(row["steps"]))), key=lambda row: int(row["seed"]))


def _settings(found: Sequence[Mapping[str, str]]) -> list[tuple[int, str]]:
    """Return the numbers of workers and methods of all rows."""
    return sorted({(int(row["workers"]), row["method"]) for row in found})


@dataclass(frozen=True)
class Gap:
    """The losses of local updates minus those of dense training with the same seed, for one size of the network."""

    parameters: int  # of the network, without the positions
    steps: int
    dense: list[float]  # losses of dense training, by seed
    gaps: list[float]


def gaps(found: Sequence[Mapping[str, str]], method: str) -> list[Gap]:
    """Return the gaps of a method, smallest network first. Each size, seed and method has its best learning rate."""
    best: dict[tuple[str, ...], dict[str, Mapping[str, str]]] = {}
    for (*size, seed), row in _best(found, "width", "layers", "method", "seed").items():
        best.setdefault(tuple(size), {})[seed] = row
    by_size = list[Gap]()
    for width, layers in (key[:2] for key in best if key[2] == method):
        dense, ours = best[width, layers, "dense"], best[width, layers, method]
        seeds = sorted(dense.keys() & ours.keys())
        losses = [[float(rows_of[seed]["loss"]) for seed in seeds] for rows_of in (dense, ours)]
        parameters = GPT(CHARACTERS, 0, Network(int(width), int(layers))).size
        steps = int(ours[seeds[0]]["steps"])
        by_size.append(Gap(parameters, steps, losses[0], [b - a for a, b in zip(*losses, strict=True)]))
    return sorted(by_size, key=lambda gap: gap.parameters)


def slope(found: Sequence[Gap]) -> tuple[float, float]:
    """Return how much the gap grows when the network has ten times the parameters, and half of its 95% interval.

    It is the slope of a line through the gaps of all seeds, by least squares. Raises ValueError for one size.
    """
    points = [(math.log10(size.parameters), gap) for size in found for gap in size.gaps]
    line = linregress(*zip(*points, strict=True))
    return float(line.slope), float(t.ppf(0.975, len(points) - 2) * line.stderr)


def sizes(found: Sequence[Mapping[str, str]]) -> str:
    """Return the Markdown table of all gaps, and the slope of each method that has several sizes."""
    lines, slopes = list[list[str]](), list[str]()
    for method in sorted({row["method"] for row in found} - {"dense"}):
        by_size = gaps(found, method)
        for size in by_size:
            cells = [f"{size.parameters / 1e6:.3f}", f"{size.steps:,}", method, str(len(size.gaps))]
            lines.append([*cells, f"{statistics.fmean(size.dense):.3f}", spread(size.gaps, 3)])
        if len(by_size) < 2:
            continue
        growth, half = slope(by_size)
        slopes.append(f"{method}: {growth:+.3f} ({growth - half:+.3f} to {growth + half:+.3f}) for ten times the size")
    return "\n\n".join([_markdown(["million parameters", "steps", "method", "seeds", "dense", "gap"], lines), *slopes])


def every_table(found: Sequence[Mapping[str, str]]) -> str:
    """Return all tables of a file of trainings, with the recipe's own rate first and then with searched rates."""
    best = searched(found)
    tables = [table(untuned(found, STEPS)), speed_ups(untuned(found)), table(best), speed_ups(best), limits(best)]
    tables.append(table(untuned(found, STEPS // 2)))
    return "\n\n".join(each for each in tables if each.count("\n") > 1)  # without those of a heading alone
