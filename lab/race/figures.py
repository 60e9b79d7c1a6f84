"""Figures of a race: losses by steps and by bytes, and the fraction of time that workers compute, by link."""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lab.docs.charts import save
from lab.race.contenders import DENSE, parse
from lab.race.curves import Curve
from lab.race.time_to_loss import Entry, StepOnLink, computing, dense_of, entries, targets_of
from packsaddle.errors import require

_OURS = ("#d1495b", "#e8871e", "#8f2d56", "#b5651d", "#f25f5c", "#c9184a", "#ffb703", "#5c1a1b", "#bc8034")
_PEERS = ("#2e6f95", "#6a994e", "#577590", "#43aa8b", "#277da1", "#90be6d", "#4d908e", "#5e60ce")
# Methods whose losses are drawn, if the race has some of them.
_SHOWN = (
    DENSE,
    "QSGD(127) hook=bucket",
    "Sign(per_tensor=True) every=8",
    "local-sgd-8",
    "powersgd-4",
    "diloco-32",
)
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 11, "legend.fontsize": 10}


def draw(folder: Path, workers: int, curves: Sequence[Curve], steps: Sequence[StepOnLink]) -> list[Path]:
    """Write the figures for which one number of workers has curves and steps, and return their files.

    Raises MissingExtraError without matplotlib.
    """
    plt: Any = require("matplotlib.pyplot", "lab", "figures of a race")
    found = entries(curves)
    dense = dense_of(found)
    files = []
    with plt.rc_context(_STYLE):
        if dense is not None:
            figure, axes = plt.subplots(2, 1, figsize=(6.5, 8), layout="constrained")
            _losses(axes, found, statistics.fmean(targets_of(dense).values()))
            files += save(figure, folder / f"losses-{workers}-workers")
        if steps:
            figure, axes = plt.subplots(figsize=(6.5, 6.5), layout="constrained")
            _computing(axes, steps)
            files += save(figure, folder / f"computing-{workers}-workers")
        plt.close("all")
    return files


def titled(method: str) -> str:
    """Return a method's name for a legend."""
    contender = parse(method, 1.0)
    n = contender.number
    peers = {
        "ddp": "DDP, float32",
        "ddp-fp16": "DDP, float16 hook",
        "powersgd-N": f"torch's PowerSGD, rank {n}",
        "local-sgd-N": f"torch's local SGD, every {n}",
        "diloco-N": f"torchft's DiLoCo, every {n}",
        "sparseloco-N": f"SparseLoCo's algorithm, every {n}",
    }
    if contender.compressor is None:
        return peers.get(contender.peer, method)
    compressor = contender.name
    if contender.hook:
        return f"packsaddle's hook, {compressor}"
    every = contender.every
    late = f", delay {contender.delay}" if contender.delay else ""
    return f"LocalUpdates every {every}, {compressor}{late}" if every else f"CompressedSGD, {compressor}"


def _colours(found: Sequence[Entry]) -> dict[str, str]:
    """Return a color for each method: warm for packsaddle's, cold for its peers', black for dense training."""
    ours = dict.fromkeys(entry.method for entry in found if entry.is_ours)
    peers = dict.fromkeys(entry.method for entry in found if not entry.is_ours and entry.method != DENSE)
    colours = {method: _OURS[i % len(_OURS)] for i, method in enumerate(ours)}
    return colours | {method: _PEERS[i % len(_PEERS)] for i, method in enumerate(peers)} | {DENSE: "0.1"}


def _losses(axes: Any, found: Sequence[Entry], target: float) -> None:
    """Draw mean and range of the loss over seeds by steps and by bytes, for the shortest training of few methods."""
    short = min(entry.curves[0].steps for entry in found)
    brief = [entry for entry in found if entry.curves[0].steps == short]
    chosen = [entry for entry in brief if entry.method in _SHOWN] or sorted(brief, key=_final)[: len(_SHOWN)]
    colours, ends = _colours(chosen), dict[str, tuple[float, str]]()
    for entry in chosen:
        first = entry.curves[0]
        losses = [[math.nan if loss is None else loss for loss in curve.losses] for curve in entry.curves]
        n = min(map(len, losses))
        at = [(i + 1) * first.every for i in range(n)]
        by_step = list(zip(*(mine[:n] for mine in losses), strict=True))
        mean, low, high = ([f(step) for step in by_step] for f in (statistics.fmean, min, max))
        style = {"color": colours[entry.method], "linewidth": 2.0 if entry.is_ours else 1.2}
        axes[0].plot(at, mean, **style)
        axes[0].fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes[1].plot([step * first.sent / 1e6 for step in at], mean, **style)
        ends[titled(entry.method)] = mean[-1], colours[entry.method]
    for panel, label in zip(axes, ("steps", "MB that a worker has sent"), strict=True):
        panel.axhline(target, color="0.5", linewidth=0.8, linestyle=":")
        panel.set_xlabel(label)
        panel.set_ylabel("validation loss")
        panel.grid(alpha=0.2)
        panel.set_ylim(top=min(3.0, panel.get_ylim()[1]))
    axes[1].set_xscale("log")
    axes[1].xaxis.set_major_formatter(lambda mb, _: f"{mb:g}")
    axes[0].set_xlim(0, 2.1 * short)
    axes[0].set_xticks(range(0, short + 1, max(1, short // 4)))
    label_ends(axes[0], ends, 1.02 * short)


def _final(entry: Entry) -> float:
    return statistics.fmean(entry.losses)


def label_ends(axes: Any, ends: Mapping[str, tuple[float, str]], x: float) -> None:
    """Write names at the ends of curves, from their last values and colors; apart where the ends are close."""
    low, high = axes.get_ylim()
    at, gap = -math.inf, (high - low) * 0.06
    for label, (last, colour) in sorted(ends.items(), key=lambda item: item[1][0]):
        at = max(last, at + gap)
        axes.text(x, at, label, color=colour, va="center")


def _computing(axes: Any, steps: Sequence[StepOnLink]) -> None:
    """Draw the fraction of time in which workers compute, by link: local updates by period, and dense training.

    Uncompressed ones are dashed; shorter periods are lighter.
    """
    table = _by_period([row for row in computing(steps) if _exchanges_at_intervals(row["contender"])])
    links = [name for name in table[0] if name != "contender"]
    periods = sorted({parse(row["contender"], 1.0).period for row in table})
    for row in sorted(table, key=lambda row: parse(row["contender"], 1.0).period):
        contender = parse(row["contender"], 1.0)
        shares = [math.nan if row[link] is None else 100 * row[link] for link in links]
        plain = contender.compressor is None or contender.compressor.lossless
        strength = 0.35 + 0.65 * (periods.index(contender.period) + 1) / len(periods)
        style = {"marker": "o", "markersize": 4, "linestyle": "--" if plain else "-", "alpha": strength}
        colour = "0.1" if contender.peer else "#2e6f95" if plain else "#d1495b"
        axes.plot(range(len(links)), shares, label=titled(row["contender"]), color=colour, **style)
    axes.set_xticks(range(len(links)), links)
    axes.set_ylabel("share of the time computing, %")
    axes.set_ylim(0, 103)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08))


def _by_period(table: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of uncompressed exchanges and of the compressor that was timed with the most periods."""
    compressors = [parse(row["contender"], 1.0).compressor for row in table]
    sparse = [c for c in compressors if c is not None and not c.lossless]
    most = max(sparse, key=sparse.count, default=None)
    return [row for row, c in zip(table, compressors, strict=True) if c is None or c.lossless or c == most]


def _exchanges_at_intervals(text: str) -> bool:
    """Return True if a contender is dense training, or local updates without overlap and outer optimizer."""
    contender = parse(text, 1.0)
    return text == DENSE or (contender.every is not None and not contender.delay and contender.outer == "none")
