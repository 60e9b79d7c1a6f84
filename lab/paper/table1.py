"""Table 1 with numbers: the paper's orders, plans for one d and epsilon, and exponents measured on known saddles.

`lab.paper.theorem` makes the measurements. The tables contain the fractions of stationary iterates, the numbers of
steps, and the exponents of these numbers in epsilon and d. The figure shows steps and bytes against epsilon and d.
An epsilon-SOSP is an epsilon-approximate second-order stationary point (Definition 2.4).
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Table

from lab import charts
from lab.origin import commit
from lab.paper import drawing
from lab.paper.study import Options, write_json
from lab.paper.theorem import COMPRESSORS, SIGMA, WIDTH, Job, all_jobs, few_jobs, measure
from lab.pool import in_parallel
from packsaddle.cli import print_table, serve
from packsaddle.cli.certificate_figure import COLOURS
from packsaddle.cli.folders import written
from packsaddle.errors import ConfigError, require
from packsaddle.theory import TABLE_1, Assumptions, plan

Run = dict[str, Any]


def shares(runs: list[Run]) -> list[Run]:
    """Return one row per setting: the fraction of x_0 ... x_T that are epsilon-SOSPs, where T is the planned number
    of steps."""
    groups = defaultdict(list)
    for run in runs:
        if run["question"] == "share" and not run["quiet"]:
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


def saddles(runs: list[Run]) -> list[Run]:
    """Return one row per compressor and variant of Algorithm 1, from the runs in which only the artificial noise xi_t
    can leave the saddle.

    A row has the fraction of iterates that are epsilon-SOSPs, and the step of the first one.
    """
    groups = defaultdict(list)
    for run in runs:
        if run["quiet"]:
            groups[run["compressor"], run["variant"]].append(run)
    return [
        {
            "compressor": compressor,
            "variant": variant,
            "T": group[0]["planned_steps"],
            "seeds": len(group),
            "smallest_share": min(run["share"] for run in group),
            "largest_share": max(run["share"] for run in group),
            "first": median(math.inf if run["first"] is None else run["first"] for run in group),
            "rolled_back": sum(run["rolled_back"] for run in group),
        }
        for (compressor, variant), group in groups.items()
    ]


def steps(runs: list[Run]) -> list[Run]:
    """Return one row per setting: the number of steps until half of the iterates are epsilon-SOSPs.

    It is measured with the planned step size, and with the best of all step sizes that were run.
    """
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
        # `fall` is the decrease of f from one saddle to the next minimum. A decrease by 1 takes 1 / fall saddles.
        fall = 2 * (WIDTH * math.sqrt(epsilon)) ** 3
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
    """Return the exponents of steps and bytes in epsilon and in d: slopes of lines fitted to the logarithms.

    `limit` is the limit of the planned number of steps' exponent for small epsilon or large d.
    """
    out = []
    for compressor in COMPRESSORS:
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
                        | {"limit": limit(compressor, lipschitz, variable)}
                        | {name: round(slope, 2) for name, slope in fits.items()}
                    )
    return out


def limit(compressor: str, lipschitz: bool, variable: str) -> float:
    """Return the exponent in `variable` of the planned number of steps, for small epsilon or large d.

    The contraction mu is that of the compressor in the measurements.
    """

    def steps_at(epsilon: float, d: int) -> float:
        known = Assumptions(d, epsilon, sigma=SIGMA, lipschitz_gradient=1.0 if lipschitz else None)
        return plan(known, COMPRESSORS[compressor]).steps

    if variable == "epsilon":
        ends = [(math.log(e), math.log(steps_at(e, 16))) for e in (1e-9, 1e-8)]
    else:
        ends = [(math.log(d), math.log(steps_at(0.2, d))) for d in (10**10, 10**9)]
    (x, y), (u, v) = ends
    return round((v - y) / (u - x), 2)


def sweep(rows: list[Run], variable: str) -> list[Run]:
    """Return the rows that differ only in `variable`, in ascending order: the longest such series."""
    other = "d" if variable == "epsilon" else "epsilon"
    counts: dict[Any, list[Run]] = defaultdict(list)
    for row in rows:
        counts[row[other]].append(row)
    most: list[Run] = max(counts.values(), key=len) if counts else []
    return sorted(most, key=lambda row: row[variable])


def fit(rows: list[Run], variable: str, quantity: str) -> float:
    return float(np.polyfit(np.log([r[variable] for r in rows]), np.log([r[quantity] for r in rows]), 1)[0])


def draw(rows: list[dict[str, Any]], compressors: Sequence[str]) -> Any:
    """Return a figure of steps against epsilon and d, and of bytes against epsilon. `rows` are those of `steps`."""
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = dict(zip(compressors, COLOURS, strict=False))
    with mpl.rc_context(drawing.STYLE):
        figure = Figure(figsize=(drawing.WIDTH, 9.5), layout="constrained")
        axes = figure.subplots(3, 1)
        lipschitz = [row for row in rows if row["lipschitz"]]
        panels = (
            (axes[0], "epsilon", ("planned", "measured", "best"), "steps per unit of f"),
            (axes[1], "d", ("planned", "measured", "best"), "steps per unit of f"),
            (axes[2], "epsilon", ("planned_bytes", "best_bytes"), "bytes per unit of f"),
        )
        styles = {"planned": ":", "measured": "--", "best": "-", "planned_bytes": "--", "best_bytes": "-"}
        for axis, variable, quantities, label in panels:
            for name, colour in colours.items():
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
        handles = [mpl.lines.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
        handles += [
            mpl.lines.Line2D([], [], color="grey", linestyle=":", label="planned T"),
            mpl.lines.Line2D([], [], color="grey", linestyle="--", label="measured, planned step size"),
            mpl.lines.Line2D([], [], color="grey", linestyle="-", label="measured, best step size"),
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=11)
        return figure


# For each row of the paper's table, the compressor that represents it in the measurements. It keeps k/d = 1/8 of the
# coordinates, or half of the energy.
STANDS_FOR = {"uncompressed": "Identity", "SketchTopK": "SketchTopK", "RandomK": "RandomK", "constant": "AdaptiveTopK"}


def measurements(wanted: Sequence[Job], folder: Path, jobs: int | None) -> list[Run]:
    """Return the measurements of `wanted`. Those that are not in the folder's runs.jsonl are made and added to it."""
    record = folder / "runs.jsonl"
    lines = _measured(record)
    done = {Job(**{key: line[key] for key in Job.__dataclass_fields__}) for line in lines}
    for _, result in in_parallel(measure, [job for job in wanted if job not in done], "table1", jobs):
        lines.append(result)
        with record.open("a") as file:
            file.write(json.dumps({**result, "commit": commit()}) + "\n")
    return lines


def _measured(record: Path) -> list[dict[str, Any]]:
    """Return the measurements in a file of JSON lines; unreadable lines are ignored.

    If the last line is incomplete, a line break is added to the file, so that the next measurement begins a new line.
    """
    lines, found = [], record.read_text() if record.exists() else ""
    for text in found.splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            continue
    if found and not found.endswith("\n"):
        with record.open("a") as file:
            file.write("\n")
    return lines


def table(rows: Sequence[Mapping[str, Any]], d: int = 1_000_000, epsilon: float = 0.1) -> dict[str, Any]:
    """Return Table 1 for one d and epsilon.

    Each row has the plan for the compressor that represents it (`STANDS_FOR`), and the measured exponents.
    """
    slopes = exponents([dict(row) for row in rows])
    found = []
    for row in TABLE_1:
        ours = STANDS_FOR[row.compressor.split()[0]]
        known = Assumptions(d, epsilon, lipschitz_gradient=1.0 if row.lipschitz else None)
        planned = plan(known, COMPRESSORS[ours])
        measured = [s for s in slopes if s["compressor"] == ours and s["lipschitz"] == row.lipschitz]
        numbers = {key: getattr(planned, key) for key in ("mu", "eta", "steps", "sent", "total", "theorem")}
        found.append({**row.plain(d, epsilon), "stands_for": ours, "plan": numbers, "exponents": measured})
    return {"d": d, "epsilon": epsilon, "rows": found}


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    if not rows:
        return
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def table1(options: Options) -> None:
    """Measure the exponents of Table 1 on problems with known saddles, and print them beside the planned ones.

    Examples:
        python -m lab.paper.table1 --out table1
        python -m lab.paper.table1 --scale smoke

    Args:
        options: Those of every study; --seeds and --only do not apply.
    """
    if options.seeds is not None or options.only:
        raise ConfigError(f"--{'only' if options.only else 'seeds'} does not apply to table1")
    folder = options.folder("table1", {})
    with written(folder):
        lines = measurements(list(few_jobs() if options.scale == "smoke" else all_jobs()), folder, options.jobs)
        rows = steps(lines)
        slopes = exponents(rows)
        write_json(folder / "table1.json", table(rows))
        tables = {"shares": shares(lines), "saddles": saddles(lines), "steps": rows, "exponents": slopes}
        for name, content in tables.items():
            _write(content, folder / f"{name}.csv")
        charts.save(draw(rows, list(COMPRESSORS)), folder / "figure")

    # Print the exponents.
    names = ("limit", "planned", "measured", "best", "planned_bytes", "best_bytes")
    headings = ("limit of T", "planned T", "measured", "measured, best eta", "bytes", "bytes, best eta")
    shown = Table("compressor", "gradient", "exponent of", *headings)
    for column in shown.columns[3:]:
        column.justify = "right"
    for row in slopes:
        gradient = "Lipschitz" if row["lipschitz"] else "not Lipschitz"
        shown.add_row(row["compressor"], gradient, row["against"], *(f"{row[name]:.2f}" for name in names))
    shown.caption = (
        "slopes in log-log on known saddles; planned is the slope of the planned T over the same epsilon or d"
    )
    print_table(shown)
    print(f"Table 1 with numbers: {folder / 'table1.json'} (and packsaddle plan table)")
    print(f"figure: {folder / 'figure-light.svg'}")


def main() -> None:
    """Run the command line."""
    serve(table1, "python -m lab.paper.table1")


if __name__ == "__main__":
    main()
