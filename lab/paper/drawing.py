"""The figures of the paper, with quantiles over seeds, from curves alone."""

from collections.abc import Iterable, Sequence
from typing import Any

from lab.runs.report import COLOURS, STYLE, Curve
from packsaddle.errors import ConfigError, require

# The paper's colors: red without noise, green with noise. Dashed and solid lines distinguish the two without colors.
NOISE_LINES = ({"color": "#C0392B", "linestyle": "--"}, {"color": "#1E8449", "linestyle": "-"})
LABELS = {
    "loss": "training loss",
    "grad_norm": "gradient norm, mean of 100 steps",
    "test_accuracy": "test accuracy",
    "epoch": "epochs",
    "megabytes": "megabytes per worker",
}


def line(axes: Any, curve: Curve, axis: str, quantity: str, label: str, style: dict[str, Any]) -> None:
    """Draw a curve's mean over seeds, and the band between the 10% and 90% quantiles of the seeds."""
    x, mean, low, high = curve.along(axis, quantity)
    axes.plot(x, mean, label=label, **style)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def grid(curves: Sequence[Curve]) -> Any:
    """Return Figure 1: loss and test accuracy, against epochs and against megabytes, in one color per curve."""
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 7), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for curve, colour in zip(curves, COLOURS, strict=False):
            for row, quantity in zip(axes, ("loss", "test_accuracy"), strict=True):
                for column, axis in zip(row, ("epoch", "megabytes"), strict=True):
                    line(column, curve, axis, quantity, curve.setting, {"color": colour})
        for row, quantity in zip(axes, ("loss", "test_accuracy"), strict=True):
            row[0].set_ylabel(LABELS[quantity])
        for column, axis in zip(axes[1], ("epoch", "megabytes"), strict=True):
            column.set_xlabel(LABELS[axis])
        axes[0][1].set_xscale("log")
        axes[0][0].legend()
        return figure


def panels(columns: Sequence[tuple[str, Sequence[tuple[Curve, str]]]], plateau: float) -> Any:
    """Return Figure 2: one column per compressor against epochs, and a column against megabytes.

    The last column shows all compressors, with noise only. `plateau` is the loss level of the dotted line.
    """
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 6.4), layout="constrained")
        axes = figure.subplots(2, len(columns) + 1, sharey="row")
        for i, (title, pairs) in enumerate(columns):
            axes[0][i].set_title(title)
            axes[1][i].set_xlabel(LABELS["epoch"])
            for (curve, noise), style in zip(pairs, NOISE_LINES, strict=True):
                for row, quantity in zip(axes, ("loss", "grad_norm"), strict=True):
                    line(row[i], curve, "epoch", quantity, noise, style)
            axes[0][i].legend()
        colours = ("#000000", "#D55E00", "#0072B2")
        for (title, pairs), colour in zip(columns, colours, strict=True):
            for row, quantity in zip(axes, ("loss", "grad_norm"), strict=True):
                line(row[-1], pairs[-1][0], "megabytes", quantity, title, {"color": colour})
        axes[0][-1].set_title("all three, with noise")
        axes[0][-1].legend()
        axes[1][-1].set_xlabel("megabytes of messages")
        for row, quantity in zip(axes, ("loss", "grad_norm"), strict=True):
            row[0].set_ylabel(LABELS[quantity])
            row[-1].set_xscale("log")
        axes[1][0].set_yscale("log")
        for axis in axes[0]:
            axis.axhline(plateau, color="grey", linewidth=1, linestyle=":")
        return figure


def pick(curves: Sequence[Curve], settings: Iterable[str]) -> list[Curve]:
    """Return the curves of the given settings, in their order. Raises ConfigError, which names a missing setting."""
    by_setting = {c.setting: c for c in curves}
    try:
        return [by_setting[setting] for setting in settings]
    except KeyError as missing:
        raise ConfigError(f"the figure needs a curve of every setting, but {missing} has none") from None
