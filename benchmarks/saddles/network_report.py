"""Results of the runs of networks: a table of times, certificates, and the figure."""

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import packsaddle
from benchmarks.rows_file import read_rows
from benchmarks.saddles.methods import NETWORK_METHODS
from benchmarks.saddles.network_runs import SEEDS, Network, Row, Rows, best_rate, follow, parse_row

CERTIFIED_METHODS = ("SGD", "AdamW", "Muon", "RandomK 1/16", "AdamW, 4 workers, local updates, Sign")
MOST_HVPS = 24
PANELS = {  # starting points by panel, with their labels
    "plateau": {"saddle": "MNIST autoencoder, on its plateau"},
    "symmetric": {"rounding": "transformer, copies equal up to 1e-7", "saddle": "copies exactly equal"},
}
COLORS = ("#2e6f95", "#e8871e")


def table(rows: Rows) -> str:
    """Return a Markdown table: median and range of steps by starting point, and of the loss at the end, per method."""
    starts = rows.network.starts
    lines = [f"| method | rate | {' | '.join(f'from {s}: steps | loss' for s in starts)} |"]
    lines.append("| --- " * (2 + 2 * len(starts)) + "|")
    for method in NETWORK_METHODS:
        lr = rows.best(method)
        if lr is not None:
            cells = [cell for start in starts for cell in _cells(_at_best(rows.rows, method, starts[0], start))]
            lines.append(f"| {method} | 2^{round(math.log2(lr))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _at_best(rows: Sequence[Row], method: str, first: str, start: str) -> list[Row]:
    """Return the rows of a method from `start` at its best rate, which was searched from `first`."""
    lr = best_rate(rows, method, first)
    return [row for row in rows if (row.method, row.start, row.lr) == (method, start, lr)]


def _cells(found: Sequence[Row]) -> tuple[str, str]:
    """Return steps and loss, as a median and range."""
    if not found:
        return "", ""
    losses = [row.loss for row in found]
    steps = sorted((row.steps if row.left else math.inf) for row in found)
    if math.isinf(steps[0]):
        times = "never"
    else:
        middle, low, high = (
            f"{x:,.0f}" if math.isfinite(x) else "never" for x in (statistics.median(steps), steps[0], steps[-1])
        )
        times = f"{middle} ({low} to {high})"
    return times, f"{statistics.median(losses):.4f} ({min(losses):.4f} to {max(losses):.4f})"


def certificates(rows: Rows, path: Path) -> None:
    """Certify the start of every seed, and seed 0 of the main methods at the first point away and at the end."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["method", "start", "seed", "where", "loss", "grad_norm", "lambda_min_lower", "lambda_min_upper", "verdict"]
        )
        for *where, module, epsilon in _points(rows):
            c = certify(rows.network, module, epsilon)
            numbers = c.loss, c.grad_norm, c.lambda_min_lower, c.lambda_min_upper
            writer.writerow([*where, *(f"{x:.3e}" for x in numbers), c.verdict])
            file.flush()


def _points(rows: Rows) -> Iterator[tuple[str, str, int, str, nn.Module, float | None]]:
    """Yield method, starting point, seed, place, module, and epsilon (None: proposed) of each certificate."""
    network = rows.network
    for seed in SEEDS:
        for view, (module, epsilon) in network.views(network.make("saddle", seed)).items():
            yield "all", "saddle", seed, f"start{view}", module, epsilon
    first = network.starts[0]
    for method in CERTIFIED_METHODS:
        if (lr := rows.best(method)) is None:
            continue
        run = follow(network, method, first, lr, 0)
        for where, weights in (("on the way", run.left_at), ("end", run.end)):
            if weights is not None:
                task = network.make("usual", 0)
                task.load_state_dict(weights)
                yield method, first, 0, where, task, None


def certify(network: Network, module: nn.Module, epsilon: float | None) -> packsaddle.Certificate:
    """Certify the mean loss of the network's certified examples; rho is estimated."""
    search = packsaddle.Search(max_hvps=MOST_HVPS, pilot_examples=0)
    return packsaddle.certify(
        module, lambda model, batch: model(*batch), network.certified, epsilon=epsilon, search=search
    )


def draw(folder: Path) -> None:
    """Draw median steps with the range of seeds by method, a panel per network; open triangles: never."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 5), layout="constrained", sharey=True)
    names = list(NETWORK_METHODS)
    for axes, (network, starts) in zip(panels, PANELS.items(), strict=True):
        every = read_rows(folder / f"{network}.csv", parse_row, "run")
        for at, (start, label) in enumerate(starts.items()):
            for y, method in enumerate(names):
                found = _at_best(every, method, next(iter(starts)), start)
                height = y + 0.18 * (2 * at - len(starts) + 1)
                _mark(axes, found, height, COLORS[at])
            axes.plot([], [], "o", color=COLORS[at], label=label)
        axes.set(xscale="log", xlabel="steps until it has left")
        axes.grid(axis="x", alpha=0.2)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(starts))
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(folder / "networks.png", dpi=120)
    plt.close(figure)


def _mark(axes: Any, found: Sequence[Row], y: float, color: str) -> None:
    """Draw the median of the seeds that have left and their range, and a triangle if some have not."""
    steps = [max(row.steps, 1) for row in found if row.left]
    if steps:
        axes.plot([min(steps), max(steps)], [y, y], color=color, lw=1.5)
        axes.plot([statistics.median(steps)], [y], "o", color=color, ms=6)
    if len(steps) < len(found):
        axes.plot([max(row.steps for row in found if not row.left)], [y], ">", mfc="none", color=color, ms=7)
