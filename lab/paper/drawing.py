"""The figures of studies, with quantiles over seeds, from curves alone. They are narrow enough to read on a phone."""

from collections.abc import Iterable, Sequence
from typing import Any

from lab.paper.results import Curve
from packsaddle.cli import certificate_figure
from packsaddle.cli.certificate_figure import COLOURS
from packsaddle.errors import require

# The paper's colors: red without noise, green with noise. Dashed and solid lines distinguish the two without colors.
NOISE_LINES = ({"color": "#C0392B", "linestyle": "--"}, {"color": "#1E8449", "linestyle": "-"})
LABELS = {
    "loss": "training loss",
    "grad_norm": "gradient norm",
    "test_accuracy": "test accuracy",
    "epoch": "epochs",
    "megabytes": "megabytes",
}
LEAST_SEEDS = 3  # of fewer seeds, no quantiles are drawn
STYLE = certificate_figure.STYLE | {
    "font.size": 12,
    "font.sans-serif": ["DejaVu Sans", "Arial"],  # an SVG repeats the list at every text
    "axes.titlesize": 12,
    "lines.linewidth": 1.5,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}
_POINTS = 100  # of a curve; a panel is 200 points wide
WIDTH, _HEIGHT = 6.5, 2.4  # of a figure, and of one row of its panels, in inches


def line_style(i: int) -> dict[str, str]:
    """Return color and dashes of the i-th curve of a figure."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", ":")[i // len(COLOURS) % 3]}


def line(axes: Any, curve: Curve, axis: str, quantity: str, label: str, style: dict[str, Any]) -> None:
    """Draw a curve's mean over seeds, and the band between the 10% and 90% quantiles of at least three seeds."""
    columns = curve.along(axis, quantity)
    every = -(-len(columns[0]) // _POINTS) or 1
    x, mean, low, high = (column[::-every][::-1] for column in columns)  # the last point is kept
    axes.plot(x, mean, label=label, **style)
    if max(curve.columns["seeds"]) >= LEAST_SEEDS:
        axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def grid(curves: Sequence[Curve]) -> Any:
    """Return a figure of two quantities, against epochs and against megabytes, in one style per curve.

    The quantities are the training loss, and the test accuracy if it was measured, otherwise the gradient norm.
    """
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    is_classifier = any(curve.along("epoch", "test_accuracy")[0] for curve in curves)
    quantities = ("loss", "test_accuracy" if is_classifier else "grad_norm")
    legend_columns = 3 if max(len(curve.setting) for curve in curves) < 16 else 2
    with mpl.rc_context(STYLE):
        lines = -(-len(curves) // legend_columns)
        figure = Figure(figsize=(WIDTH, 2 * _HEIGHT + 0.25 * lines), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for i, curve in enumerate(curves):
            for row, quantity in zip(axes, quantities, strict=True):
                for column, axis in zip(row, ("epoch", "megabytes"), strict=True):
                    line(column, curve, axis, quantity, curve.setting, line_style(i))
        for row, quantity in zip(axes, quantities, strict=True):
            row[0].set_ylabel(LABELS[quantity])
        for column, axis in zip(axes[1], ("epoch", "megabytes"), strict=True):
            column.set_xlabel(LABELS[axis])
        axes[0][1].set_xscale("log")
        if not is_classifier:
            axes[1][0].set_yscale("log")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=legend_columns, fontsize=11)
        return figure


def panels(rows: Sequence[tuple[str, Sequence[tuple[Curve, str]]]], plateau: float) -> Any:
    """Return Figure 2: loss and gradient norm, in one row per compressor against epochs, and a row against megabytes.

    The last row shows all compressors, with noise only. `plateau` is the loss level of the dotted line.
    """
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    quantities = ("loss", "grad_norm")
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, _HEIGHT * (len(rows) + 1)), layout="constrained")
        axes = figure.subplots(len(rows) + 1, 2, sharey="col")
        for i, (title, pairs) in enumerate(rows):
            for axis, quantity in zip(axes[i], quantities, strict=True):
                for (curve, noise), style in zip(pairs, NOISE_LINES, strict=True):
                    line(axis, curve, "epoch", quantity, noise, style)
                line(axes[-1][quantities.index(quantity)], pairs[-1][0], "megabytes", quantity, title, line_style(i))
                axis.set_title(title)
        axes[-1][0].set_title("all three, with noise")
        for column, quantity in zip(axes.T, quantities, strict=True):
            column[-1].set_xscale("log")
            column[-1].set_xlabel("megabytes of messages")
            column[-2].set_xlabel(LABELS["epoch"])
            for axis in column:
                axis.set_ylabel(LABELS[quantity])
        axes[0][1].set_yscale("log")
        for axis in axes[:, 0]:
            axis.axhline(plateau, color="grey", linewidth=1, linestyle=":")
        for axis in (axes[0][0], axes[-1][0]):
            axis.legend(fontsize=11, loc="lower left")
        return figure


def pick(curves: Sequence[Curve], settings: Iterable[str]) -> list[Curve]:
    """Return the curves of the given settings, in their order."""
    by_setting = {curve.setting: curve for curve in curves}
    return [by_setting[setting] for setting in settings]
