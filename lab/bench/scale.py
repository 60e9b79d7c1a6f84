"""Extrapolate the model of a step's time to 10,000 workers and 1e11 coordinates: tables and figures.

    python -m lab.bench.scale --out experiments/scale

The speed of coding (packing and unpacking messages) is measured once on this machine, on up to 4 million coordinates,
and stored in paces.json; delete the file to measure it again.
"""

import argparse
import csv
import json
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from scipy.integrate import quad
from scipy.special import log_ndtr, ndtri

from lab import charts
from packsaddle import QSGD, Compressor, Identity, LowRank, RandomK, Sign, SketchTopK, TopK
from packsaddle.comm import choose
from packsaddle.errors import require
from packsaddle.plan import Dense, Fleet, Line, Link, Pace, Step, compressed, measure

# For each method: compressor, exchange, color and line style. The colors are those of Okabe and Ito, which color-blind
# readers can distinguish; the line styles distinguish the exchanges.
CONTENDERS: dict[str, tuple[Compressor, str, str, str]] = {
    "dense (DDP)": (Identity(), "dense", "#000000", "-"),
    "RandomK 1%": (RandomK(0.01), "direct", "#0072B2", "-"),
    "LowRank 4": (LowRank(4), "direct", "#009E73", "-"),
    "SketchTopK 1%": (SketchTopK(0.01), "direct", "#56B4E9", "-"),
    "TopK 1% all-gather": (TopK(0.01), "direct", "#D55E00", "--"),
    "TopK 1% two-way": (TopK(0.01), "two-way", "#D55E00", "-"),
    "TopK 1% coordinator": (TopK(0.01), "coordinator", "#CC79A7", ":"),
    "Sign all-gather": (Sign(), "direct", "#E69F00", "--"),
    "QSGD all-gather": (QSGD(), "direct", "#8C8C00", "--"),
}
# For each link: rate in bit/s, latency in seconds, and the speed of a worker's coding in units of one thread of this
# machine. A datacenter's workers are GPUs, whose memory is assumed to be 100 times as fast as one thread; this is not
# measured.
LINKS = {
    "100 Mbit/s": (1e8, 1e-3, 1.0),
    "1 Gbit/s": (1e9, 2e-4, 1.0),
    "100 Gbit/s, coding 100 x as fast": (1e11, 2e-5, 100.0),
}
WORKERS = [2, 3, 4, 6, 8, 12, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 10_000]
SIZES = [10**i for i in range(6, 12)]
D, W = 10**8, 64  # number of coordinates while workers vary, and number of workers while coordinates vary
COMPUTE, SPREAD = 1.0, 0.1  # computing time of a step in seconds, and its relative standard deviation over workers


def paces(path: Path) -> dict[str, Pace]:
    """Return each compressor's speed of coding on this machine, read from a file.

    If the file does not exist, the speeds are measured and written to it.
    """
    torch.set_num_threads(1)
    if not path.exists():
        found = {name: asdict(measure(c, 1 << 22)) for name, (c, *_) in CONTENDERS.items() if name != "dense (DDP)"}
        found["Identity"] = asdict(measure(Identity(), 1 << 22))
        path.write_text(json.dumps(found, indent=1) + "\n")
    stored = json.loads(path.read_text())
    return {name: Pace(**{kind: Line(**line) for kind, line in lines.items()}) for name, lines in stored.items()}


def steps(name: str, d: int, workers: int, pace: dict[str, Pace], speed: float) -> list[Step]:
    """Return the modelled step of a method, as a list of one.

    The dense method has two alternatives: buckets that overlap with the backward pass, or one all-reduce after it. For
    LowRank the coordinates are divided into matrices of 4096 x 4096.
    """
    compressor, exchange, *_ = CONTENDERS[name]
    if exchange == "dense":
        return [Dense(4 * d), Dense(4 * d, overlap=False, bucket=4 * d)]
    if isinstance(compressor, LowRank):
        rows, rest = divmod(d, 4096)
        shapes = [(4096, 4096)] * (rows // 4096) + [(rows % 4096, 4096), (rest, 1)]
        compressor = compressor.for_tensors([torch.Size(shape) for shape in shapes if min(shape)])
    protocol = choose(compressor, exchange, d=d, dense=0, workers=workers).aggregator

    def seconds(work: Any) -> float:
        return pace["Identity" if isinstance(work.compressor, Identity) else name].seconds(work) / speed

    return [compressed(protocol, d, 0, workers, seconds)]


def table(pace: dict[str, Pace]) -> list[dict[str, Any]]:
    """Return one row for every method on every link, with varying numbers of workers and of coordinates."""
    points = [("workers", D, workers) for workers in WORKERS] + [("d", d, W) for d in SIZES]
    rows = []
    for link_name, (bits, latency, speed) in LINKS.items():
        link = Link.nominal(bits, latency)
        for axis, d, workers in points:
            for name in CONTENDERS:
                fleet, waiting = Fleet(workers, COMPUTE), COMPUTE * (expected_maximum(workers, SPREAD) - 1)
                alternatives = [step.time(link, fleet) for step in steps(name, d, workers, pace, speed)]
                time = min(alternatives, key=lambda t: t.total)
                times = {"compute": time.compute, "waiting": waiting, **asdict(time)}
                parts = {part: f"{seconds:.6g}" for part, seconds in times.items()}
                setting = {"axis": axis, "link": link_name, "contender": name, "d": d, "workers": workers}
                rows.append({**setting, **parts, "seconds": f"{time.total + waiting:.6g}"})
    return rows


STYLE = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "font.size": 10}
TICKS = [1, 2, 5, 10, 60, 600, 3600, 86400, 864000]
TICK_LABELS = ["1 s", "2 s", "5 s", "10 s", "1 min", "10 min", "1 h", "1 day", "10 days"]


def draw(rows: list[dict[str, Any]], axis: str, path: Path) -> None:
    """Draw a figure with one panel per link, against workers or coordinates (`axis`). Curves have labels at the end."""
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 12), layout="constrained")
        panels = figure.subplots(3, 1)
        for panel, link in zip(panels, LINKS, strict=True):
            chosen = [row for row in rows if (row["axis"], row["link"]) == (axis, link)]
            ends = {}
            for name, (*_, colour, dashes) in CONTENDERS.items():
                curve = [row for row in chosen if row["contender"] == name]
                x, y = [row[axis] for row in curve], [float(row["seconds"]) for row in curve]
                panel.plot(x, y, color=colour, linestyle=dashes, linewidth=1.8)
                ends[name] = (y[-1], colour)
            panel.set(xscale="log", yscale="log", title=link)
            panel.set_yticks(TICKS, TICK_LABELS)
            panel.minorticks_off()
            panel.set_ylim(0.7, 2e6 if axis == "d" else 2e5)
            panel.set_xlabel("workers (d = $10^8$)" if axis == "workers" else f"coordinates d ({W} workers)")
            panel.set_xlim(x[0], x[-1])
            label(panel, ends)
        panels[0].set_ylabel("time of one step")
        charts.save(figure, path)


def label(panel: Any, ends: dict[str, tuple[float, str]]) -> None:
    """Write each curve's name to the right of its end, and move names apart that would overlap."""
    low, high = panel.get_ylim()
    names = sorted(ends, key=lambda name: ends[name][0])
    heights = [math.log(ends[name][0] / low) / math.log(high / low) for name in names]
    for _ in range(500):
        for i in range(1, len(heights)):
            overlap = 0.045 - (heights[i] - heights[i - 1])
            if overlap > 0:
                heights[i - 1] = max(0.0, heights[i - 1] - overlap / 2)
                heights[i] += overlap / 2
    for name, height in zip(names, heights, strict=True):
        at = (1.02, height)
        panel.annotate(name, at, xycoords="axes fraction", color=ends[name][1], va="center", fontsize=9)


@cache
def expected_maximum(workers: int, spread: float) -> float:
    """Return the expected maximum of `workers` independent times of mean 1 and standard deviation `spread`.

    A time is the exponential function of a normal random number. The expected maximum is an integral over the largest
    of these normal numbers, which is computed by quadrature.
    """
    sigma = math.sqrt(math.log1p(spread**2))

    def integrand(z: float) -> float:
        log_density = math.log(workers / math.sqrt(2 * math.pi)) - z**2 / 2 + (workers - 1) * log_ndtr(z)
        return math.exp(sigma * z - sigma**2 / 2 + log_density)

    center = float(ndtri(1 - 1 / workers))  # approximate normal score of the slowest worker
    return float(quad(integrand, center - 8, center + 10 + sigma, limit=200)[0])


def stragglers() -> list[dict[str, Any]]:
    """Return rows of the expected time of the slowest of W workers over the mean time of a worker."""
    return [
        {"workers": w, "spread": s, "slowest / mean": f"{expected_maximum(w, s):.4g}"}
        for w in (2, 8, 64, 1024, 10_000)
        for s in (0.05, 0.1, 0.3)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    rows = table(paces(out / "paces.json"))
    write(out / "scale.csv", rows)
    write(out / "stragglers.csv", stragglers())
    draw(rows, "workers", out / "workers")
    draw(rows, "d", out / "d")


if __name__ == "__main__":
    main()
