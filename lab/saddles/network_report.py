"""Results of the runs of networks: a table of times, certificates, and the figure."""

import csv
import math
import statistics
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

import packsaddle
from lab.bench.rows_file import read_rows
from lab.saddles.methods import NETWORK_METHODS
from lab.saddles.network_runs import SEEDS, Network, Row, Rows, best_rate, follow, parse_row

CERTIFIED_METHODS = ("AdamW", "SGD")
MOST_HVPS = 16  # products of a certificate
PANELS = {  # starting points by panel, with their labels
    "plateau": {"saddle": ""},
    "symmetric": {"rounding": "copies equal up to 1e-7", "saddle": "copies exactly equal"},
}
TITLES = {"plateau": "MNIST autoencoder on its plateau", "symmetric": "transformer of equal copies"}
TICKS = (3, 10, 30, 100, 300, 1000)
COLORS = ("#2e6f95", "#e8871e")


def table(folder: Path) -> str:
    """Return a Markdown table by method: rate, steps by starting point, and loss at the end, for each network."""
    heads = ["method"]
    for network, starts in PANELS.items():
        labels = [label or "steps" for label in starts.values()]
        heads += [f"{network}: rate", labels[0], "loss", *labels[1:]]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    rows = {network: read_rows(folder / f"{network}.csv", parse_row, "run") for network in PANELS}
    for method in NETWORK_METHODS:
        cells = [method]
        for network, starts in PANELS.items():
            first, *others = starts
            found = _at_best(rows[network], method, first, first)
            rate = f"2^{round(math.log2(found[0].lr))}" if found else ""
            loss = f"{statistics.median(row.loss for row in found):.3g}" if found else ""
            elsewhere = [_times(_at_best(rows[network], method, first, start)) for start in others]
            cells += [rate, _times(found), loss, *elsewhere]
        if any(cells[1:]):
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _at_best(rows: Sequence[Row], method: str, first: str, start: str) -> list[Row]:
    """Return the rows of a method from `start` at its best rate, which was searched from `first`."""
    lr = best_rate(rows, method, first)
    return [row for row in rows if (row.method, row.start, row.lr) == (method, start, lr)]


def _times(found: Sequence[Row]) -> str:
    """Return the median and range of the steps, "" without runs."""
    if not found or not any(row.left for row in found):
        return "never" if found else ""
    steps = sorted(row.steps if row.left else math.inf for row in found)
    middle, low, high = (
        f"{x:,.0f}" if math.isfinite(x) else "never" for x in (statistics.median(steps), steps[0], steps[-1])
    )
    return f"{middle} ({low} to {high})"


def certificates(rows: Rows, path: Path) -> None:
    """Certify the start of each seed, and seed 0 of the main methods at the first point away and at the end."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["method", "start", "seed", "where", "loss", "grad_norm", "lambda_min_lower", "lambda_min_upper", "verdict"]
        )
        for *where, module, epsilon, rho in _points(rows):
            c = certify(rows.network, module, epsilon, rho)
            numbers = c.loss, c.grad_norm, c.lambda_min_lower, c.lambda_min_upper
            writer.writerow([*where, *(f"{x:.3e}" for x in numbers), c.verdict])
            file.flush()


def _points(rows: Rows) -> Iterator[tuple[str, str, int, str, nn.Module, float | None, float | None]]:
    """Yield method, starting point, seed, place, module, epsilon and rho (None: not given) of each certificate."""
    network = rows.network
    for seed in SEEDS:
        suffix, module, epsilon, rho = network.saddle_function(network.make("saddle", seed))
        yield "all", "saddle", seed, f"start{suffix}", module, epsilon, rho
    for method, start in product(CERTIFIED_METHODS, network.starts):
        if start == "usual" or (lr := rows.best(method)) is None:
            continue
        run = follow(network, method, start, lr, 0)
        for where, weights in (("on the way", run.left_at), ("end", run.end)):
            if weights is None:
                continue
            task = network.make("usual", 0)
            task.load_state_dict(weights)
            if run.left_at is not None:
                yield method, start, 0, where, task, None, None
            else:  # still at the saddle
                suffix, module, epsilon, rho = network.saddle_function(task)
                yield method, start, 0, f"{where}{suffix}", module, epsilon, rho


def certify(network: Network, module: nn.Module, epsilon: float | None, rho: float | None) -> packsaddle.Certificate:
    """Certify the mean loss of the network's certified examples; None: no verdict on stationarity, and estimated."""
    search = packsaddle.Search(max_hvps=MOST_HVPS, pilot_examples=0)
    return packsaddle.certify(
        module,
        lambda model, batch: model(*batch),
        network.certified,
        epsilon=epsilon,
        hessian_lipschitz=rho,
        search=search,
    )


def draw(folder: Path) -> None:
    """Draw median steps with the range of seeds by method, a panel per network; triangles: the median has not left."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    rows = {network: read_rows(folder / f"{network}.csv", parse_row, "run") for network in PANELS}
    made = {row.method for every in rows.values() for row in every}
    names = sorted(made, key=list(NETWORK_METHODS).index)
    figure, panels = plt.subplots(1, len(PANELS), figsize=(12, 4.6), layout="constrained", sharey=True)
    for axes, (network, starts) in zip(panels, PANELS.items(), strict=True):
        first, *_ = starts
        for at, (start, label) in enumerate(starts.items()):
            for y, method in enumerate(names):
                found = _at_best(rows[network], method, first, start)
                if found:
                    _mark(axes, found, y + 0.18 * (2 * at - len(starts) + 1), COLORS[at])
            axes.plot([], [], "o", color=COLORS[at], label=label)
        axes.set(xscale="log", xlabel="steps until it has left", xlim=(3, 1300))
        axes.set_xticks(TICKS, [f"{tick:,}" for tick in TICKS])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
        axes.set_title(TITLES[network], fontsize=10, loc="left")
        if len(starts) > 1:
            axes.legend(frameon=False, loc="upper left")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].invert_yaxis()
    figure.savefig(folder / "networks.png", dpi=120)
    plt.close(figure)


def _mark(axes: Any, found: Sequence[Row], y: float, color: str) -> None:
    """Draw the range and the median; seeds that have not left count with the steps of the run."""
    steps = [row.steps for row in found]
    stayed = sum(not row.left for row in found) > len(found) / 2
    axes.plot([min(steps), max(steps)], [y, y], color=color, lw=1.5)
    axes.plot([statistics.median(steps)], [y], ">" if stayed else "o", mfc="none" if stayed else color, color=color)
