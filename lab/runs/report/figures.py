"""Figures of settings: quantities as means over seeds, and certificates, against bytes sent, epochs and other axes."""

import io
import math
import re
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from lab.runs.report.curves import (
    QUANTITIES,
    Curve,
    bounded_certificates,
    certificate_position,
    plateaus,
    smallest_threshold,
    standstill,
)
from lab.runs.report.settings import Axis, Setting, position
from packsaddle.cli.certificate_figure import COLOURS, NO_METADATA, STYLE
from packsaddle.errors import require

PANELS = {
    "loss": "training loss",
    "grad_norm": "stochastic gradient norm",
    "test_loss": "test loss",
    "test_accuracy": "test accuracy",
    "curvature": "smallest eigenvalue of the Hessian",
}
AXIS_NAMES: dict[Axis, str] = {
    "megabytes": "megabytes per worker",
    "epoch": "epochs",
    "step": "steps",
    "seconds": "seconds",
    "rounds": "rounds",
}
_LOGARITHMIC = {"megabytes", "rounds"}  # axes that compression and local updates change by orders of magnitude
_INTERVALS = 200  # intervals into which an axis is divided; of a long curve only the extremes in each are drawn


def line_style(i: int) -> dict[str, str]:
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}


def panels(settings: Sequence[Setting], curves: Sequence[Curve]) -> list[str]:
    """Return the keys of `PANELS` to draw: loss and gradient norm always, and each remaining one if it was measured."""
    measured = {q for q in QUANTITIES if any(c.along("epoch", q)[0] for c in curves)} | {"loss", "grad_norm"}
    if any(bounded_certificates(run) for setting in settings for run in setting.runs):
        measured.add("curvature")
    return [panel for panel in PANELS if panel in measured]


def draw(settings: Sequence[Setting], curves: Sequence[Curve]) -> Any:
    """Return a figure with a row of plots for each of `panels`, against megabytes per worker and against epochs."""
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = panels(settings, curves)
    columns: tuple[Axis, Axis] = ("megabytes", "epoch")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10.5, 3.2 * len(rows) + 0.5), layout="constrained")
        axes = figure.subplots(len(rows), 2, sharex="col", sharey="row")
        for i, panel in enumerate(rows):
            for j, along in enumerate(columns):
                _draw_panel(axes[i][j], panel, along, settings, curves)
            axes[i][0].set_ylabel(PANELS[panel])
        for j, along in enumerate(columns):
            axes[-1][j].set_xlabel(AXIS_NAMES[along])
        if "curvature" in rows:  # add a legend of the verdicts' markers above the panel of certificates
            handles, labels = axes[-1][0].get_legend_handles_labels()
            by_verdict = dict(zip(labels, handles, strict=True))
            place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0}
            axes[-1][0].legend(by_verdict.values(), by_verdict, ncols=4, fontsize=8, columnspacing=1, **place)

        # Add a legend with the largest number of columns that fits into about 130 letters, filled column by column.
        handles, labels = axes[0][0].get_legend_handles_labels()

        def letters(count: int) -> int:
            height = -(-len(labels) // count)
            return sum(max(map(len, labels[i : i + height])) + 8 for i in range(0, len(labels), height))

        fitting = next((n for n in (4, 3, 2) if n <= len(labels) and letters(n) <= 130), 1)
        figure.legend(handles, labels, loc="outside upper center", ncols=fitting)
        return figure


def inline_svg(panel: str, along: Axis, settings: Sequence[Setting], curves: Sequence[Curve]) -> str:
    """Return one panel as an <svg> element for an HTML page, without a legend.

    Colors of the palette are the page's CSS variables --c0, --c1, ..., and black is --c0. All marks of the i-th setting
    have the class setting-i.
    """
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    # The salt makes the ids of SVG elements unique in the page.
    own = {"svg.fonttype": "none", "svg.hashsalt": f"{panel} {along}", "font.size": 11}
    with mpl.rc_context(STYLE | own):
        figure, file = Figure(figsize=(4.8, 3.1)), io.StringIO()
        axes = figure.add_axes((0.16, 0.17, 0.82, 0.8))  # fixed, since a layout engine would take most of the time
        _draw_panel(axes, panel, along, settings, curves)
        axes.set_xlabel(AXIS_NAMES[along])
        figure.savefig(file, format="svg", transparent=True, metadata=NO_METADATA)

    # Remove metadata and excess digits, and use the page's colors and classes.
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", file.getvalue(), flags=re.DOTALL)
    text = re.sub(r'<g id="(setting-\d+)"', r'<g class="\1"', text[text.index("<svg") :])
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for i, colour in enumerate(COLOURS):
        text = text.replace(colour.lower(), f"var(--c{i})")
    return text


def _draw_panel(axes: Any, panel: str, along: Axis, settings: Sequence[Setting], curves: Sequence[Curve]) -> None:
    """Draw one panel with all settings.

    An axis is logarithmic only if there are finite, positive values on it, since diverged runs may have none.
    """
    log_x = along in _LOGARITHMIC and any(_positive(c.columns[along], c.columns["loss_mean"]) for c in curves)
    if panel == "curvature":
        _draw_bounds(axes, settings, along)
        axes.set_yscale("symlog", linthresh=smallest_threshold(settings))
    else:
        _draw_curves(axes, curves, along, panel, log_x)
    if panel == "loss":
        for level in plateaus(settings):
            axes.axhline(level, color="grey", linewidth=1, linestyle=":")
        # Draw a broad, pale bar for each standstill at the end of a run, at the level of the loss.
        for i, setting in enumerate(settings):
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 7, "alpha": 0.3, "solid_capstyle": "butt"}
            for run in setting.runs:
                if (still := standstill(run.metrics)) is not None:
                    ends = [position(line, along) for line in (run.metrics[-still.lines], run.metrics[-1])]
                    axes.plot(ends, [still.level] * 2, gid=f"setting-{i}", **style)
    if panel == "test_accuracy":
        axes.yaxis.set_major_formatter("{x:.0%}")
    if panel == "grad_norm" and any(_positive(c.columns["grad_norm_mean"]) for c in curves):
        axes.set_yscale("log")
        _few_ticks(axes.yaxis)
    if log_x:
        axes.set_xscale("log")
        _few_ticks(axes.xaxis)


def _few_ticks(axis: Any) -> None:
    """Label a logarithmic axis at powers of ten, as plain numbers.

    An axis of at most two decades also has labels at 2 and 5 times the powers of ten.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    if 0 < low < high <= 100 * low:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())


def _draw_curves(axes: Any, curves: Sequence[Curve], along: Axis, quantity: str, log_x: bool) -> None:
    for i, c in enumerate(curves):
        x, mean, low, high = c.along(along, quantity)
        kept = thinned(x, (mean, low, high), log_x)
        x, mean, low, high = ([column[k] for k in kept] for column in (x, mean, low, high))
        # Change labels that contain "$" or start with "_": matplotlib would read formulas in the former, and omit the
        # latter from the legend.
        label = (" " if c.setting.startswith("_") else "") + c.setting.replace("$", r"\$")
        axes.plot(x, mean, label=label, gid=f"setting-{i}", **line_style(i))
        if low != high:
            band = {"color": line_style(i)["color"], "alpha": 0.2, "linewidth": 0, "gid": f"setting-{i}"}
            axes.fill_between(x, low, high, **band)


def thinned(x: Sequence[float], columns: Sequence[Sequence[float]], log: bool) -> list[int]:
    """Return the indices of the points of a curve to draw, in ascending order.

    For a short curve these are all points. For a long one they are its ends and, in each of 200 equal intervals of the
    axis, the points at which some column is smallest or largest. With `log` the intervals are equal in log x.
    """
    if len(x) <= 2 * _INTERVALS:
        return list(range(len(x)))
    place = np.nan_to_num(np.asarray(x, dtype=float), posinf=0.0, neginf=0.0)
    if log and (place > 0).any():
        place = np.log(np.maximum(place, place[place > 0].min()))
    interval = ((place - place.min()) / (np.ptp(place) or 1.0) * _INTERVALS).astype(int)
    kept = {0, len(x) - 1}

    # Sort by interval, then by value, so that the extremes of an interval are at the ends of its part. NaNs come last.
    for column in map(np.asarray, columns):
        order = np.lexsort((column, interval))
        ends = np.flatnonzero(np.diff(interval[order]))
        kept.update(order[[0, *(ends + 1)]].tolist(), order[[*ends, -1]].tolist())
    return sorted(kept)


def _positive(*columns: Sequence[float]) -> bool:
    """Return True if some row is positive and finite in all columns, which a logarithmic axis needs.

    If all runs diverged, there may be no such row.
    """
    return any(all(0 < v < math.inf for v in line) for line in zip(*columns, strict=True))


# The marker of a certificate, by its verdict.
_MARKERS = {
    "saddle": "v",
    "second-order stationary": "o",
    "gradient too large": "x",
    "not a minimum": "1",
    "no negative curvature": "2",
    "undecided": ".",
}


def _draw_bounds(axes: Any, settings: Sequence[Setting], along: Axis) -> None:
    """Draw each certificate: a bar from its lower to its upper bound, a marker for its verdict, and its threshold."""
    for i, setting in enumerate(settings):
        style = {"color": COLOURS[i % len(COLOURS)], "gid": f"setting-{i}"}
        known = [[(certificate_position(run, c, along), c) for c in bounded_certificates(run)] for run in setting.runs]
        for own in known:
            axes.plot([x for x, _ in own], [c["threshold"] for _, c in own], linewidth=1, linestyle=":", **style)
        for x, c in chain.from_iterable(known):
            # If the gradient was too large, curvature was not measured, and the marker is drawn on the threshold.
            looked = c["verdict"] != "gradient too large"
            if looked:
                axes.vlines(x, c["lambda_min_lower"], c["lambda_min_upper"], **style)
            height = c["lambda_min_upper"] if looked else c["threshold"]
            axes.plot(x, height, _MARKERS[c["verdict"]], markersize=7, label=c["verdict"], **style)
