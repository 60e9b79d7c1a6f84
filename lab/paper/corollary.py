"""Corollaries 3.3 and 3.4 measured: steps and bytes against epsilon and d, with k as the corollary has it.

    python -m lab.paper.corollary run --out experiments/corollary       # continues with the missing runs
    python -m lab.paper.corollary tables --out experiments/corollary    # exponents.csv and figure.png

Runs start at the cosine problem's saddle of curvature -1.25 sqrt(epsilon), with the parameters of `packsaddle.theory`
("practical" constants) and the oracle of experiments/theorem (sigma = 0.3). RandomK sends k = d epsilon^(3/4) /
sqrt(alpha) coordinates, alpha = 1 under Assumption C and d without it. The oracle without Assumption C has the law of
the other along a single run, so alpha = d changes only k and the planned step size.

TopK sends as many coordinates as RandomK, with the parameters of Theorem 3.1, or with those of RandomK (`TopK, as
linear`), where only the selection differs. SharedTopK and SketchTopK have RandomK's parameters too; they select by what
several workers have, so their sweep runs `CompressedSGD` with two workers, whose mean gradient has the same noise.
"""

import csv
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median

from lab.bench.rows_file import add_rows, read_rows
from lab.paper.compiled_runs import Selection, Setting, escapes
from lab.paper.library_runs import library_escapes
from lab.paper.power_law import Exponent, difference, exponent
from lab.paper.rows_command import main
from lab.paper.theorem import SIGMA, WIDTH, bytes_per_step
from packsaddle.compressors import Compressor, Identity, RandomK, SharedTopK, SketchTopK, TopK
from packsaddle.theory import Assumptions, plan

LOOKS = 400  # iterates examined in one planned interval
METHODS = ("uncompressed", "RandomK", "TopK, as linear", "TopK")


@dataclass(frozen=True)
class Sweep:
    """Points at which one variable changes, for one alpha and one factor of the planned step size."""

    name: str
    alpha: str  # "1" or "d"
    points: tuple[tuple[float, int], ...]  # epsilon, d
    factor: float  # eta is the planned one times this, I is divided by it
    methods: tuple[str, ...]
    seeds: int
    library: bool = False  # CompressedSGD with two workers in place of the compiled algorithm

    @property
    def variable(self) -> str:
        """The variable that changes, "epsilon" or "d"."""
        return "epsilon" if len({epsilon for epsilon, _ in self.points}) > 1 else "d"


EPSILONS = (0.4, 0.28, 0.2, 0.14, 0.1, 0.07, 0.05, 0.04, 0.028)
DIMENSIONS = (16, 50, 160, 500, 1600)
# Without Assumption C these epsilon make k = 8 epsilon^(3/4) an integer, 4 to 1.
WHOLE_K = (0.3969, 0.2704, 0.1575, 0.0625)
LINEAR = METHODS[:3]
SHARED = (*LINEAR, "SharedTopK", "SketchTopK")
SWEEPS = (
    Sweep("alpha 1, epsilon", "1", tuple((e, 64) for e in EPSILONS[:7]), 1, LINEAR, 20),
    Sweep("TopK, epsilon", "1", tuple((e, 16) for e in (0.4, 0.2, 0.1, 0.05)), 1, ("TopK",), 10),
    Sweep("TopK, d", "1", tuple((0.4, d) for d in (16, 64, 256)), 1, ("TopK",), 10),
    Sweep("alpha 1, epsilon, 16 eta", "1", tuple((e, 64) for e in EPSILONS), 16, LINEAR, 20),
    Sweep("alpha 1, d, 16 eta", "1", tuple((0.2, d) for d in DIMENSIONS), 16, LINEAR, 20),
    Sweep("alpha d, d, 16 eta", "d", tuple((0.4, d) for d in DIMENSIONS[:4]), 16, LINEAR, 10),
    Sweep("alpha 1, d", "1", tuple((0.2, d) for d in DIMENSIONS[:4]), 1, LINEAR, 10),
    Sweep("alpha d, epsilon, 16 eta", "d", tuple((e, 64) for e in WHOLE_K), 16, METHODS[:2], 5),
    Sweep("two workers, epsilon, 16 eta", "1", tuple((e, 64) for e in EPSILONS[:6]), 16, SHARED, 5, library=True),
)


@dataclass(frozen=True)
class Row:
    """One run."""

    sweep: str
    method: str
    epsilon: float
    d: int
    seed: int
    k: int
    eta: float
    planned: int  # T of the plan for f_max = 1, at its own step size
    first: int | None  # step of the first epsilon-SOSP; None: not within T
    half: int | None  # step from which half of the iterates are epsilon-SOSPs; None: not within T


def corollary_k(epsilon: float, d: int, alpha: str) -> int:
    """Return k = d epsilon^(3/4) / sqrt(alpha), rounded, from 1 to d."""
    exact: float = d * epsilon**0.75 / math.sqrt(d if alpha == "d" else 1)
    return min(d, max(1, round(exact)))


def compressor(method: str, k: int) -> Compressor:
    """Return the compressor whose theorem gives the method's parameters."""
    if method == "uncompressed":
        return Identity()
    return TopK(k=k) if method == "TopK" else RandomK(k=k, block_size=1)


def assumptions(epsilon: float, d: int, alpha: str, f_max: float) -> Assumptions:
    """Return what the planner is told: L = rho = 1."""
    return Assumptions(d, epsilon, sigma=SIGMA, f_max=f_max, lipschitz_gradient=1.0 if alpha == "1" else None)


def fall(epsilon: float) -> float:
    """Return the decrease of f from the saddle, 2 width^3; a decrease of 1 takes 1 / fall such saddles."""
    return 2 * (WIDTH * math.sqrt(epsilon)) ** 3


def measure(sweep: Sweep, method: str, epsilon: float, d: int, seeds: Sequence[int]) -> list[Row]:
    """Run Algorithm 1 until half of the examined iterates are epsilon-SOSPs, at most the planned steps."""
    k = corollary_k(epsilon, d, sweep.alpha)
    planned = plan(assumptions(epsilon, d, sweep.alpha, fall(epsilon)), compressor(method, k))
    unit = plan(assumptions(epsilon, d, sweep.alpha, 1.0), compressor(method, k))
    eta, interval = planned.eta * sweep.factor, max(1, math.ceil(planned.interval / sweep.factor))
    selection: Selection = "none" if method == "uncompressed" else "RandomK" if method == "RandomK" else "TopK"
    deviation = math.hypot(SIGMA / math.sqrt(d), planned.noise)
    width = WIDTH * math.sqrt(epsilon)
    setting = Setting(d, epsilon, width, deviation, eta, interval, planned.radius, selection, k)
    limit, stride = math.ceil(planned.steps / sweep.factor), max(1, interval // LOOKS)
    if sweep.library:
        found = library_escapes(setting, MESSAGES[method](k), planned.noise, seeds, limit=limit, stride=stride)
    else:
        found = escapes(setting, seeds, limit=limit, stride=stride, until_half=True)
    return [Row(sweep.name, method, epsilon, d, e.seed, k, eta, unit.steps, e.first, e.half) for e in found]


def missing(rows: Sequence[Row]) -> Iterator[tuple[Sweep, str, float, int, list[int]]]:
    """Yield the sweep, method, epsilon, d and seeds that are to be run."""
    done = {(row.sweep, row.method, row.epsilon, row.d, row.seed) for row in rows}
    for sweep in SWEEPS:
        for epsilon, d in sweep.points:
            for method in sweep.methods:
                seeds = [s for s in range(sweep.seeds) if (sweep.name, method, epsilon, d, s) not in done]
                if seeds:
                    yield sweep, method, epsilon, d, seeds


def read(path: Path) -> list[Row]:
    """Return the rows of a file; [] if there is none."""

    def step(text: str) -> int | None:
        return int(text) if text else None

    def row(line: Mapping[str, str]) -> Row:
        return Row(
            *(line["sweep"], line["method"], float(line["epsilon"]), int(line["d"]), int(line["seed"])),
            *(int(line["k"]), float(line["eta"]), int(line["planned"]), step(line["first"]), step(line["half"])),
        )

    return read_rows(path, row, "run")


Groups = dict[float, list[float]]


def steps(rows: Sequence[Row], sweep: Sweep, method: str, quantity: str) -> Groups:
    """Return steps for a decrease of f by 1, by the sweep's variable: `quantity` is "first", "half" or "planned".

    Runs that did not reach it are left out.
    """
    groups: Groups = {}
    for row in rows:
        value = getattr(row, quantity)
        if (row.sweep, row.method) == (sweep.name, method) and value:
            scale = sweep.factor if quantity == "planned" else fall(row.epsilon)
            groups.setdefault(getattr(row, sweep.variable), []).append(value / scale)
    return groups


def sent(groups: Groups, sweep: Sweep, make: str) -> Groups:
    """Return the bytes that one of four workers sends in these steps, with the messages of a compressor."""
    found: Groups = {}
    for x, values in groups.items():
        epsilon, d = next(p for p in sweep.points if x in p)
        k = corollary_k(epsilon, d, sweep.alpha)
        found[x] = [value * bytes_per_step(MESSAGES[make](k), d) for value in values]
    return found


MESSAGES: dict[str, Callable[[int], Compressor]] = {
    "uncompressed": lambda _: Identity(),
    "RandomK": lambda k: RandomK(k=k, block_size=1),
    "TopK": lambda k: TopK(k=k),
    "TopK, as linear": lambda k: TopK(k=k),
    "SketchTopK": lambda k: SketchTopK(k=k),
    "SharedTopK": lambda k: SharedTopK(k=k),
}


@dataclass(frozen=True)
class Fit:
    """Exponents of one method in one sweep."""

    sweep: str
    method: str
    variable: str
    runs: int
    failed: int  # runs in which half of the iterates were not epsilon-SOSPs within the planned steps
    planned: float  # exponent of the planned steps
    first: Exponent  # of steps to the first epsilon-SOSP
    half: Exponent  # of steps until half of the iterates are
    bytes: Exponent  # of bytes until half of the iterates are
    gain: Exponent | None  # exponent of the bytes less uncompressed SGD's


def fits(rows: Sequence[Row]) -> list[Fit]:
    """Return the exponents of all sweeps whose runs are there."""
    found = []
    for sweep in SWEEPS:
        dense = steps(rows, sweep, "uncompressed", "half")
        for method in sweep.methods:
            mine = [row for row in rows if (row.sweep, row.method) == (sweep.name, method)]
            half = steps(rows, sweep, method, "half")
            if len(half) < 3:
                continue
            bytes_of = sent(half, sweep, method)
            comparable = method != "uncompressed" and sorted(dense) == sorted(half)
            found.append(
                Fit(
                    *(sweep.name, method, sweep.variable, len(mine), sum(row.half is None for row in mine)),
                    planned=exponent(steps(rows, sweep, method, "planned"), draws=1).value,
                    first=exponent(steps(rows, sweep, method, "first")),
                    half=exponent(half),
                    bytes=exponent(bytes_of),
                    gain=difference(bytes_of, sent(dense, sweep, "uncompressed")) if comparable else None,
                )
            )
    return found


def table(found: Sequence[Fit]) -> str:
    """Return the Markdown table of exponents."""
    lines = [
        "| sweep | method | planned | first | half | bytes | bytes less uncompressed | failed |",
        "| --- " * 8 + "|",
    ]
    lines += [
        f"| {f.sweep} | {f.method} | {f.planned:.2f} | {f.first} | {f.half} | {f.bytes} | {f.gain or ''} | "
        f"{f.failed} of {f.runs} |"
        for f in found
    ]
    return "\n".join(lines)


def write(found: Sequence[Fit], path: Path) -> None:
    """Write the exponents with their intervals to a CSV file."""
    names = ("first", "half", "bytes", "gain")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
        writer.writerow(["sweep", "method", "variable", "runs", "failed", "planned", *ends])
        for f in found:
            values = [value for name in names for value in _ends(getattr(f, name))]
            writer.writerow([f.sweep, f.method, f.variable, f.runs, f.failed, f"{f.planned:.3f}", *values])


def _ends(found: Exponent | None) -> list[str]:
    return ["", "", ""] if found is None else [f"{value:.3f}" for value in astuple(found)]


COLOURS = {"uncompressed": "0.2", "RandomK": "#2e6f95", "TopK, as linear": "#6a994e", "TopK": "#e8871e"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw bytes until half of the iterates are epsilon-SOSPs: against epsilon and d, for both alpha."""
    import matplotlib.pyplot as plt

    plt.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
    shown = ("alpha 1, epsilon", "alpha 1, d", "alpha d, epsilon, 16 eta", "alpha d, d, 16 eta")
    figure, panels = plt.subplots(1, 4, figsize=(14, 3.8), layout="constrained")
    for axes, name in zip(panels, shown, strict=True):
        sweep = next(s for s in SWEEPS if s.name == name)
        for method in sweep.methods:
            groups = sent(steps(rows, sweep, method, "half"), sweep, method)
            xs = sorted(groups)
            if not xs:
                continue
            middle = [median(groups[x]) for x in xs]
            color = COLOURS[method]
            axes.plot(xs, middle, color=color, marker="o", ms=4, label=method)
            axes.fill_between(
                xs, [min(groups[x]) for x in xs], [max(groups[x]) for x in xs], color=color, alpha=0.15, lw=0
            )
        step = "planned step size" if sweep.factor == 1 else f"{sweep.factor:g} times the planned step size"
        axes.set(xscale="log", yscale="log", xlabel=sweep.variable, title=f"alpha = {sweep.alpha}, {step}")
        axes.title.set_fontsize(9)
        ticks = sorted({epsilon if sweep.variable == "epsilon" else d for epsilon, d in sweep.points})[::2]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.2)
    panels[0].set_ylabel("bytes per worker for a decrease of f by 1")
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def run(path: Path) -> None:
    """Make the missing runs."""
    for sweep, method, epsilon, d, seeds in list(missing(read(path))):
        rows = measure(sweep, method, epsilon, d, seeds)
        add_rows(path, map(asdict, rows))
        print(sweep.name, method, epsilon, d, [row.half for row in rows], flush=True)


def tables(path: Path) -> None:
    """Print the exponents, and write them and the figure next to the rows."""
    rows = read(path)
    found = fits(rows)
    print(table(found))
    write(found, path.with_name("exponents.csv"))
    draw(rows, path.with_name("figure.png"))


if __name__ == "__main__":
    main(__doc__, run, tables)
