"""The distribution of the time to escape, not its mean: 500 seeds at one setting.

    python -m lab.paper.escape_times run --out experiments/escape-times      # continues with the missing parts
    python -m lab.paper.escape_times tables --out experiments/escape-times

The setting is that of experiments/theorem: the cosine problem's saddle, d = 16, epsilon = 0.2, sigma = 0.3, planned
parameters, k as in Corollary 3.3. A run's time is the first step whose iterate is an epsilon-SOSP. `compiled` runs are
those of `compiled_runs`; `library` runs, with 16 times the planned step size, are `CompressedSGD`'s.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import NormalDist

import numpy as np

from lab.bench.rows_file import add_rows, read_rows
from lab.paper.compiled_runs import Selection, Setting, escapes
from lab.paper.corollary import assumptions, compressor, corollary_k, fall
from lab.paper.problems import Oracle
from lab.paper.proof import Method
from lab.paper.proof.trajectory import Run
from lab.paper.rows_command import main
from lab.paper.theorem import SIGMA, WIDTH, Job, setting, stationary
from packsaddle.theory import Plan, plan

EPSILON, D, FACTOR = 0.2, 16, 16
SEEDS, LIBRARY_SEEDS, SHARE_SEEDS = 500, 100, 50  # the last two of RandomK alone
SELECTIONS: dict[str, Selection] = {"uncompressed": "none", "RandomK": "RandomK", "TopK, as linear": "TopK"}
WIDTH_HERE = WIDTH * math.sqrt(EPSILON)
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass(frozen=True)
class Row:
    """One run."""

    source: str  # "compiled", "library" or "share"
    method: str
    factor: int  # eta is the planned one times this
    seed: int
    first: int | None  # step of the first epsilon-SOSP; None: not within the planned steps
    share: float | None  # of epsilon-SOSPs among x_0 ... x_T, every 10th examined; None: the run was stopped before


def planned(method: str) -> Plan:
    """Return the plan of a method; TopK has RandomK's."""
    k = corollary_k(EPSILON, D, "1")
    return plan(assumptions(EPSILON, D, "1", fall(EPSILON)), compressor(method, k))


def parameters(method: str, factor: int) -> tuple[Setting, int]:
    """Return the setting and the planned number of steps."""
    found = planned(method)
    deviation = math.hypot(SIGMA / math.sqrt(D), found.noise)
    interval = math.ceil(found.interval / factor)
    setting = Setting(
        *(D, EPSILON, WIDTH_HERE, deviation, found.eta * factor, interval, found.radius),
        *(SELECTIONS[method], corollary_k(EPSILON, D, "1")),
    )
    return setting, math.ceil(found.steps / factor)


def compiled(method: str, factor: int, seeds: Sequence[int]) -> list[Row]:
    """Run until half of the iterates are epsilon-SOSPs; every iterate is examined."""
    chosen, limit = parameters(method, factor)
    return [
        Row("compiled", method, factor, e.seed, e.first, None)
        for e in escapes(chosen, seeds, limit=limit, until_half=True)
    ]


def shares(method: str, seeds: Sequence[int]) -> list[Row]:
    """Run all planned steps, and examine every tenth iterate."""
    chosen, limit = parameters(method, 1)
    found = escapes(chosen, seeds, limit=limit, stride=10, until_half=False)
    return [Row("share", method, 1, e.seed, e.first, round(e.share, 4)) for e in found]


def library(method: str, factor: int, seed: int) -> Row:
    """Run `CompressedSGD` until its first epsilon-SOSP."""
    chosen, limit = parameters(method, factor)
    problem, start, known = setting(Job("half", "cosine", EPSILON, D, "Identity", seed))
    k, noise = corollary_k(EPSILON, D, "1"), planned(method).noise
    method_of = Method(chosen.eta, compressor("TopK" if chosen.selection == "TopK" else method, k), noise)
    run = Run(
        Oracle(problem, SIGMA, seed=1000 + seed),
        method_of,
        start,
        seed=seed,
        segment=(chosen.interval, chosen.radius),
    )
    for t in range(limit + 1):
        if stationary(problem, run.x, known):
            return Row("library", method, factor, seed, t, None)
        run.advance()
    return Row("library", method, factor, seed, None, None)


def predicted(quantile: float, factor: int) -> float:
    """Return the quantile of the time that the linear recursion predicts for uncompressed SGD.

    Along the escape direction s <- (1 + eta w) s + eta deviation Z from s = 0, so s_t is Gaussian with the variance
    (eta deviation)^2 ((1 + eta w)^(2t) - 1) / ((1 + eta w)^2 - 1). The iterate is an epsilon-SOSP from
    |s| = w acos(sqrt(epsilon) / w) on, if the gradient is small enough there.
    """
    chosen, _ = parameters("uncompressed", factor)
    growth = 1 + chosen.eta * WIDTH_HERE
    distance = WIDTH_HERE * math.acos(math.sqrt(EPSILON) / WIDTH_HERE)
    z = NormalDist().inv_cdf(1 - quantile / 2)  # |Z| exceeds it with probability `quantile`
    ratio = (distance / (z * chosen.eta * chosen.deviation)) ** 2
    return math.log(1 + ratio * (growth**2 - 1)) / (2 * math.log(growth))


def tail_rate(times: Sequence[float], above: float = 0.9) -> float:
    """Return the rate of the exponential tail beyond a quantile, by maximum likelihood: 1 / the mean excess."""
    threshold = float(np.quantile(times, above))
    excess = [t - threshold for t in times if t > threshold]
    return len(excess) / sum(excess)


def parts(done: Sequence[Row]) -> Iterator[Callable[[], list[Row]]]:
    """Yield the parts of the study that are to be run, short ones first; rows of a part are written together."""
    found = {(row.source, row.method, row.factor) for row in done}
    for factor in (FACTOR, 1):
        for method in SELECTIONS:
            if ("compiled", method, factor) not in found:
                yield partial(compiled, method, factor, range(SEEDS))
    if ("share", "RandomK", 1) not in found:
        yield partial(shares, "RandomK", range(SHARE_SEEDS))
    there = sum(row.source == "library" for row in done)
    for seed in range(there, LIBRARY_SEEDS):
        yield partial(_library_rows, seed)


def _library_rows(seed: int) -> list[Row]:
    return [library("RandomK", FACTOR, seed)]


def read(path: Path) -> list[Row]:
    """Return the rows of a file; [] if there is none."""

    def row(line: Mapping[str, str]) -> Row:
        return Row(
            *(line["source"], line["method"], int(line["factor"]), int(line["seed"])),
            first=int(line["first"]) if line["first"] else None,
            share=float(line["share"]) if line["share"] else None,
        )

    return read_rows(path, row, "run")


def firsts(rows: Sequence[Row], source: str, method: str, factor: int) -> list[float]:
    """Return the times of a group; a run without an epsilon-SOSP counts as infinite."""
    mine = [row for row in rows if (row.source, row.method, row.factor) == (source, method, factor)]
    return [math.inf if row.first is None else float(row.first) for row in mine]


def table(rows: Sequence[Row]) -> str:
    """Return the Markdown table of quantiles, tails and shares."""
    from scipy.stats import ks_2samp

    lines = [
        "| runs | step size | " + " | ".join(f"{q:.1%}" for q in QUANTILES) + " | tail rate / (eta w) |",
        "| --- " * (len(QUANTILES) + 3) + "|",
    ]
    for factor in (1, FACTOR):
        rate = parameters("uncompressed", factor)[0].eta * WIDTH_HERE
        values = " | ".join(f"{predicted(q, factor):,.0f}" for q in QUANTILES)
        lines.append(f"| predicted, uncompressed | x {factor} | {values} | 1 |")
        for source in ("compiled", "library"):
            for method in SELECTIONS:
                times = firsts(rows, source, method, factor)
                if times:
                    known = [q for q in QUANTILES if len(times) * (1 - q) >= 1]
                    values = " | ".join(f"{np.quantile(times, q):,.0f}" if q in known else "" for q in QUANTILES)
                    tail, error = tail_rate(times) / rate, 1 / math.sqrt(len(times) / 10)
                    shown = f"{tail:.2f} ± {2 * error * tail:.2f}" if len(times) == SEEDS else ""
                    lines.append(f"| {source}, {method}, {len(times)} seeds | x {factor} | {values} | {shown} |")
    for method in SELECTIONS:
        pair = firsts(rows, "library", method, FACTOR), firsts(rows, "compiled", method, FACTOR)
        if all(pair):
            lines.append(f"\n{method}: library and compiled, Kolmogorov-Smirnov p = {ks_2samp(*pair).pvalue:.2f}")
    for method in SELECTIONS:
        found = [row.share for row in rows if row.source == "share" and row.method == method and row.share is not None]
        if found:
            lines.append(f"\n{method}: share of epsilon-SOSPs {min(found):.3f} to {max(found):.3f}, {len(found)} seeds")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the fraction of runs that have not escaped against steps, for both step sizes."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    colors = {"uncompressed": "0.2", "RandomK": "#2e6f95", "TopK, as linear": "#6a994e"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", sharey=True)
    levels = np.geomspace(1, 1e-3, 60)
    for axes, factor in zip(panels, (1, FACTOR), strict=True):
        for method, color in colors.items():
            times = sorted(firsts(rows, "compiled", method, factor))
            axes.step(times, 1 - np.arange(1, len(times) + 1) / len(times), color=color, lw=1.6, label=method)
            times = sorted(firsts(rows, "library", method, factor))
            if times:
                left = 1 - np.arange(1, len(times) + 1) / len(times)
                axes.plot(times, left, ".", color=color, ms=3)
        expected = [predicted(1 - level, factor) for level in levels[1:]]
        axes.plot(expected, levels[1:], "--", color="#d1495b", lw=1.4, label="predicted, uncompressed")
        axes.set(yscale="log", xlabel="step", ylim=(1e-3, 1), xlim=(0, None))
        axes.set_title(f"{'' if factor == 1 else f'{factor} times '}the planned step size", fontsize=10)
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("fraction of runs not at an epsilon-SOSP yet")
    panels[1].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(path: Path) -> None:
    """Make the missing parts of the study."""
    for make in parts(read(path)):
        add_rows(path, map(asdict, make()))


def tables(path: Path) -> None:
    """Print the quantiles, and draw the figure next to the rows."""
    rows = read(path)
    print(table(rows))
    draw(rows, path.with_name("figure.png"))


if __name__ == "__main__":
    main(__doc__, run, tables)
