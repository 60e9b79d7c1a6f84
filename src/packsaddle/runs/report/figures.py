"""Static figures of settings: means over seeds against epochs and bytes sent."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from packsaddle.errors import require
from packsaddle.runs.report.curves import Curve, plateaus, points, smallest_threshold, stills
from packsaddle.runs.report.settings import Axis, Setting

STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "packsaddle",  # reproducible files
}
_NO_METADATA = {"Date": None, "Creator": None}
# Okabe and Ito's palette for color-blind readers; black first, for the baseline.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")
QUANTITY_NAMES = {
    "loss": "training loss",
    "grad_norm": "stochastic gradient norm",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
}
_COLUMNS: dict[Axis, str] = {"epoch": "epochs", "megabytes": "megabytes per worker"}


def line_style(i: int) -> dict[str, str]:
    """Return color and line style of the i-th setting; after eight settings colors repeat in another line style."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}


def draw(settings: Sequence[Setting], curves: Sequence[Curve]) -> Any:
    """Return a figure of settings and their curves: means over seeds, with bands from the 10% to the 90% quantile.

    Columns: epochs and megabytes per worker. Rows: loss, gradient norm and, if measured, test loss, test accuracy
    and the bounds on the Hessian's smallest eigenvalue.
    """
    require("matplotlib", "plot", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    tested = [q for q in ("test_loss", "test_accuracy") if any(c.along("epoch", q)[0] for c in curves)]
    quantities = ["loss", "grad_norm", *tested]
    certified = any(points(setting) for setting in settings)
    rows = len(quantities) + certified

    # One row per quantity, then the bounds of certificates.
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.2 * rows + 0.5), layout="constrained")
        axes = figure.subplots(rows, 2, sharex="col", sharey="row")
        for column, (along, name) in zip(axes.T, _COLUMNS.items(), strict=True):
            for axis, quantity in zip(column, quantities, strict=False):  # without the certificates' row
                _draw_curves(axis, curves, along, quantity)
            for level in plateaus(settings):
                column[0].axhline(level, color="grey", linewidth=1, linestyle=":")
            _draw_stills(column[0], settings, along)
            if certified:
                _draw_bounds(column[-1], settings, along)
            column[-1].set_xlabel(name)

        # Names and scales, shared by rows and columns. Axis limits depend on this order of calls.
        for axis, quantity in zip(axes[:, 0], quantities, strict=False):
            axis.set_ylabel(QUANTITY_NAMES[quantity])
        if certified:
            _name_bounds(axes[-1][0], settings)
        if any(_positive(c.columns["grad_norm_mean"]) for c in curves):
            axes[1][0].set_yscale("log")
        if any(_positive(c.columns["megabytes"], c.columns["loss_mean"]) for c in curves):
            axes[-1][1].set_xscale("log")
        _add_legend(figure, *axes[0][0].get_legend_handles_labels())
        return figure


def _draw_curves(axes: Any, curves: Sequence[Curve], along: Axis, quantity: str) -> None:
    for i, c in enumerate(curves):
        x, mean, low, high = c.along(along, quantity)
        axes.plot(x, mean, label=_plain(c.setting), **line_style(i))
        axes.fill_between(x, low, high, color=line_style(i)["color"], alpha=0.2, linewidth=0)


def _draw_stills(axes: Any, settings: Sequence[Setting], along: Axis) -> None:
    """Draw a broad, pale bar for each standstill of a loss, at its level."""
    for i, setting in enumerate(settings):
        for still in stills(setting):
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 7, "alpha": 0.3, "solid_capstyle": "butt"}
            axes.plot(still.x[along], [still.found.level] * 2, **style)


def _positive(*columns: Sequence[float]) -> bool:
    """Return True if a log axis has data: a row that is positive and finite in all columns (none if runs diverged)."""
    return any(all(0 < v < math.inf for v in line) for line in zip(*columns, strict=True))


def _plain(label: str) -> str:
    """Escape a label for matplotlib, which would read "$" as a formula and hide labels that start with "_"."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def _add_legend(figure: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Add a legend with the largest number of columns that fits into about 130 letters, filled column by column."""

    def letters(columns: int) -> int:
        height = -(-len(labels) // columns)
        return sum(max(map(len, labels[i : i + height])) + 8 for i in range(0, len(labels), height))

    columns = next((n for n in (4, 3, 2) if n <= len(labels) and letters(n) <= 130), 1)
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)


# Markers by verdict.
_MARKERS = {"saddle": "v", "second-order stationary": "o", "gradient too large": "x", "undecided": "."}


def _draw_bounds(axes: Any, settings: Sequence[Setting], along: Axis) -> None:
    """Draw a bar from the lower to the upper bound of every certificate, a marker for its verdict, the threshold."""
    for i, setting in enumerate(settings):
        colour, known = COLOURS[i % len(COLOURS)], points(setting)
        for run in setting.runs:
            own = [p for p in known if p.run is run]
            thresholds = [p.certificate["threshold"] for p in own]
            axes.plot([p.x[along] for p in own], thresholds, color=colour, linewidth=1, linestyle=":")
        for p in known:
            c, x = p.certificate, p.x[along]
            if p.looked:
                axes.vlines(x, c["lambda_min_lower"], c["lambda_min_upper"], colors=colour)
            # Without curvature bounds, the marker is on the threshold.
            height = c["lambda_min_upper"] if p.looked else c["threshold"]
            axes.plot(x, height, _MARKERS[c["verdict"]], color=colour, markersize=7, label=c["verdict"])


def _name_bounds(axes: Any, settings: Sequence[Setting]) -> None:
    axes.set_ylabel("smallest eigenvalue of the Hessian")
    axes.set_yscale("symlog", linthresh=smallest_threshold(settings))
    handles, labels = axes.get_legend_handles_labels()
    by_verdict = dict(zip(labels, handles, strict=True))
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}  # above the axes
    axes.legend(by_verdict.values(), by_verdict.keys(), ncols=4, fontsize=8, columnspacing=1, **place)


def save(figure: Any, folder: Path, name: str = "figure", dpi: int = 150, source: str | None = None) -> None:
    """Write NAME.png and NAME.svg to a folder, with `source`, if given, as metadata."""
    said = {"Source": source} if source else {}
    figure.savefig(folder / f"{name}.png", dpi=dpi, metadata=said)
    figure.set_layout_engine("none")  # keep the layout; computing it takes as long as drawing
    figure.savefig(folder / f"{name}.svg", metadata={**_NO_METADATA, **said})
