"""The figure of Table 1: steps and bytes against epsilon and d."""

from collections.abc import Sequence
from typing import Any

from packsaddle.data import require
from packsaddle.figures import COLOURS
from packsaddle.reproduce.exponents import sweep

STYLE: dict[Any, Any] = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}


def draw(rows: list[dict[str, Any]], compressors: Sequence[str]) -> Any:
    """Return steps against epsilon and d, and bytes against epsilon, of `exponents.steps`'s rows."""
    require("matplotlib", "plot", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    colours = dict(zip(compressors, COLOURS, strict=False))
    with mpl.rc_context(STYLE):
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
        figure.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=9)
        return figure
