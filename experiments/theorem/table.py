"""Tables and figure of the runs of run.py.

python experiments/theorem/table.py DIR

reads DIR/runs.jsonl and writes shares.csv, steps.csv, exponents.csv and figure.png beside it.
"""

import csv
import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
from matplotlib.figure import Figure

Run = dict[str, Any]
COLOURS = {
    "Identity": "#000000",
    "RandomK": "#0072B2",
    "TopK": "#D55E00",
    "SketchTopK": "#009E73",
    "AdaptiveTopK": "#CC79A7",
}
WIDTH = 1.25  # of the cosine's saddle, in units of sqrt(epsilon)


def shares(runs: list[Run]) -> list[Run]:
    """The share of epsilon-SOSPs among x_0 ... x_T for the planned T, a row per setting."""
    groups = defaultdict(list)
    for run in runs:
        if run["question"] == "share":
            groups[run["constants"], run["problem"], run["epsilon"], run["d"], run["compressor"]].append(run)
    rows = []
    for (constants, problem, epsilon, d, compressor), group in sorted(groups.items()):
        rows.append(
            {
                "constants": constants,
                "problem": problem,
                "epsilon": epsilon,
                "d": d,
                "compressor": compressor,
                "theorem": group[0]["theorem"],
                "T": group[0]["planned_steps"],
                "seeds": len(group),
                "smallest_share": min(run["share"] for run in group),
                "first_half_at": max((run["half"] or math.inf) for run in group),
                "rolled_back": sum(run["rolled_back"] for run in group),
            }
        )
    return rows


def steps(runs: list[Run]) -> list[Run]:
    """Steps until half of the iterates are epsilon-SOSPs, with the planned step size and with the best one tried."""
    groups: dict[Any, dict[float, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        if run["question"] == "half":
            key = (run["lipschitz"], run["epsilon"], run["d"], run["compressor"])
            groups[key][run["factor"]].append(run)
    rows = []
    for (lipschitz, epsilon, d, compressor), by_factor in sorted(groups.items()):
        medians = {f: median(run["half"] or math.inf for run in group) for f, group in by_factor.items()}
        every = {f: m for f, m in medians.items() if all(run["half"] for run in by_factor[f])}
        best = min(every, key=lambda f: every[f])
        planned = by_factor[1.0][0]
        fall = 2 * (WIDTH * math.sqrt(epsilon)) ** 3  # of f from one saddle; a fall of 1 takes 1 / fall of them
        rows.append(
            {
                "lipschitz": lipschitz,
                "epsilon": epsilon,
                "d": d,
                "compressor": compressor,
                "seeds": len(by_factor[1.0]),
                "eta": planned["eta"],
                "bound_by": planned["bound_by"],
                "planned": planned["planned_steps_f1"],
                "measured": medians[1.0] / fall,
                "best": every[best] / fall,
                "best_factor": best,
                "bytes_per_step": planned["bytes_per_step"],
                "planned_bytes": medians[1.0] / fall * planned["bytes_per_step"],
                "best_bytes": every[best] / fall * planned["bytes_per_step"],
            }
        )
    return rows


def exponents(rows: list[Run]) -> list[Run]:
    """Slopes in log-log of steps and bytes, against epsilon and against d, by least squares."""
    out = []
    for compressor in COLOURS:
        for lipschitz in (True, False):
            mine = [row for row in rows if row["compressor"] == compressor and row["lipschitz"] == lipschitz]
            for variable in ("epsilon", "d"):
                points = sweep(mine, variable)
                if len(points) > 2:
                    fits = {
                        name: fit(points, variable, name)
                        for name in ("planned", "measured", "best", "planned_bytes", "best_bytes")
                    }
                    out.append(
                        {"compressor": compressor, "lipschitz": lipschitz, "against": variable}
                        | {name: round(slope, 2) for name, slope in fits.items()}
                    )
    return out


def sweep(rows: list[Run], variable: str) -> list[Run]:
    """The rows in which only this variable changes."""
    other = "d" if variable == "epsilon" else "epsilon"
    counts = defaultdict(list)
    for row in rows:
        counts[row[other]].append(row)
    return sorted(max(counts.values(), key=len, default=[]), key=lambda row: row[variable])


def fit(rows: list[Run], variable: str, quantity: str) -> float:
    return float(np.polyfit(np.log([r[variable] for r in rows]), np.log([r[quantity] for r in rows]), 1)[0])


def draw(rows: list[Run], path: Path) -> None:
    """Steps against epsilon and d, and bytes against epsilon."""
    with mpl.rc_context({"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}):
        figure = Figure(figsize=(12.5, 4.6), layout="constrained")
        axes = figure.subplots(1, 3)
        lipschitz = [row for row in rows if row["lipschitz"]]
        panels = (
            (axes[0], "epsilon", ("planned", "measured", "best"), "steps per unit of f"),
            (axes[1], "d", ("planned", "measured", "best"), "steps per unit of f"),
            (axes[2], "epsilon", ("planned_bytes", "best_bytes"), "bytes sent per worker and unit of f"),
        )
        styles = {"planned": ":", "measured": "--", "best": "-", "planned_bytes": "--", "best_bytes": "-"}
        for axis, variable, quantities, label in panels:
            for name, colour in COLOURS.items():
                points = sweep([row for row in lipschitz if row["compressor"] == name], variable)
                for quantity in quantities:
                    xs, ys = [p[variable] for p in points], [p[quantity] for p in points]
                    axis.plot(xs, ys, styles[quantity], color=colour, marker="o", markersize=3.5)
            axis.set_xscale("log")
            axis.set_yscale("log")
            ticks = sorted({row[variable] for row in lipschitz})
            axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.set_xlabel({"epsilon": "epsilon (d = 16)", "d": "d (epsilon = 0.2)"}[variable])
            axis.set_ylabel(label)
        handles = [mpl.lines.Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
        handles += [
            mpl.lines.Line2D([], [], color="grey", linestyle=":", label="planned T"),
            mpl.lines.Line2D([], [], color="grey", linestyle="--", label="measured, planned step size"),
            mpl.lines.Line2D([], [], color="grey", linestyle="-", label="measured, best step size"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=9)
        figure.savefig(path, dpi=140)


def write(rows: list[Run], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def main() -> None:
    folder = Path(sys.argv[1])
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    rows = steps(runs)
    for name, table in (("shares", shares(runs)), ("steps", rows), ("exponents", exponents(rows))):
        if table:
            write(table, folder / f"{name}.csv")
            print((folder / f"{name}.csv").read_text())
    draw(rows, folder / "figure.png")


if __name__ == "__main__":
    main()
