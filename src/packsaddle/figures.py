"""Charts of runs: loss and gradient norm against epochs and against bytes sent."""

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from packsaddle.data import require
from packsaddle.runfolder import Run

_STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "svg.hashsalt": "packsaddle",  # the same runs give the same file
}
_NO_METADATA = {"Date": None, "Creator": None}
# Okabe and Ito's palette, distinguishable by colour-blind readers; black first, for the baseline.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")


def draw(runs: Sequence[Run]) -> Any:
    """Return a figure with four panels: rows loss and gradient norm, columns epochs and megabytes per worker."""
    require("matplotlib", "plot", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = [run for run in runs if run.metrics]
    wire = all(run.metrics[-1]["sent"] for run in drawn)  # with one worker nothing is sent
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 7), layout="constrained")
        axes = figure.subplots(2, 2, sharex="col", sharey="row")
        for i, run in enumerate(runs):
            # Beyond eight runs colours come again, in another line style.
            line = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3]}
            _draw_run(axes, run, line, "sent" if wire else "payload")
        for level in {run.config.get("plateau") for run in runs} - {None}:
            for axis in axes[0]:
                axis.axhline(level, color="grey", linewidth=1, linestyle=":")
        axes[0][0].set_ylabel("training loss")
        axes[1][0].set_ylabel("stochastic gradient norm")
        axes[1][0].set_xlabel("epochs")
        if drawn:  # a logarithmic axis needs data
            axes[1][0].set_yscale("log")
            axes[1][1].set_xscale("log")
        axes[1][1].set_xlabel("megabytes sent per worker" if wire else "megabytes of messages per worker")
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(runs)))
        return figure


def _draw_run(axes: Any, run: Run, line_style: dict[str, str], bytes_of: str) -> None:
    epochs = [line["epoch"] for line in run.metrics]
    megabytes = [line[bytes_of] / 1e6 for line in run.metrics]
    for row, quantity in zip(axes, ("loss", "grad_norm"), strict=True):
        values = [line[quantity] for line in run.metrics]
        for axis, x in zip(row, (epochs, megabytes), strict=True):
            axis.plot(x, values, label=run.label, **line_style)


def save(figure: Any, folder: Path) -> None:
    """Write figure.png and figure.svg into a folder."""
    figure.savefig(folder / "figure.png", dpi=150)
    figure.savefig(folder / "figure.svg", metadata=_NO_METADATA)


def to_svg(figure: Any) -> str:
    """Return a figure as an <svg> element to be put into a page."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
