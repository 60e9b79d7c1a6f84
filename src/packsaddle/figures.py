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
    """Return a figure with columns epochs and megabytes per worker, and rows loss, gradient norm and, if runs were
    certified on the way, the bounds on the Hessian's smallest eigenvalue."""
    require("matplotlib", "plot", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    drawn = [run for run in runs if run.metrics]
    certified = any(run.certificates for run in drawn)
    rows = 3 if certified else 2
    wire = all(run.metrics[-1]["sent"] for run in drawn)  # with one worker nothing is sent
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 3.5 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, sharex="col", sharey="row")
        for i, run in enumerate(runs):
            # Beyond eight runs colours come again, in another line style.
            line = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": ("-", "--", ":")[i // len(_COLOURS) % 3]}
            _draw_run(axes[:2], run, line, "sent" if wire else "payload")
            if certified:
                _draw_bounds(axes[2], run, line["color"], "sent" if wire else "payload")
        for level in {run.config.get("plateau") for run in runs} - {None}:
            for axis in axes[0]:
                axis.axhline(level, color="grey", linewidth=1, linestyle=":")
        axes[0][0].set_ylabel("training loss")
        axes[1][0].set_ylabel("stochastic gradient norm")
        if certified:
            axes[2][0].set_ylabel("smallest eigenvalue of the Hessian")
            axes[2][0].set_yscale("symlog", linthresh=_smallest_threshold(drawn))
        axes[-1][0].set_xlabel("epochs")
        if drawn:  # a logarithmic axis needs data
            axes[1][1].set_xscale("log")
        if any(line["grad_norm"] > 0 for run in drawn for line in run.metrics):  # not so if all diverged
            axes[1][0].set_yscale("log")
        axes[-1][1].set_xlabel("megabytes sent per worker" if wire else "megabytes of messages per worker")
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


# What a certificate said, as a marker.
_MARKERS = {"saddle": "v", "second-order stationary": "o", "gradient too large": "x", "undecided": "."}


def _draw_bounds(row: Any, run: Run, colour: str, bytes_of: str) -> None:
    """A bar from the lower to the upper bound for every certificate, its verdict, and the threshold."""
    known = [c for c in run.certificates if c.get("lambda_min_lower") is not None] if run.metrics else []
    moved = {line["step"]: line[bytes_of] / 1e6 for line in run.metrics}
    megabytes = [moved[max((s for s in moved if s <= c["step"]), default=min(moved))] for c in known]
    for axis, xs in zip(row, ([c["epoch"] for c in known], megabytes), strict=True):
        for x, c in zip(xs, known, strict=True):
            if c["verdict"] != "gradient too large":
                axis.vlines(x, c["lambda_min_lower"], c["lambda_min_upper"], colors=colour)
        axis.plot(xs, [c["threshold"] for c in known], color=colour, linewidth=1, linestyle=":")
        for verdict, marker in _MARKERS.items():
            # Curvature was not looked into where the gradient was too large: such marks lie on the threshold.
            height = "threshold" if verdict == "gradient too large" else "lambda_min_upper"
            points = [(x, c[height]) for x, c in zip(xs, known, strict=True) if c["verdict"] == verdict]
            if points:
                axis.plot(*zip(*points, strict=True), marker, color=colour, markersize=7, label=verdict)
    if known:
        handles, labels = row[0].get_legend_handles_labels()
        by_verdict = dict(zip(labels, handles, strict=True))
        row[0].legend(by_verdict.values(), by_verdict.keys())


def _smallest_threshold(runs: Sequence[Run]) -> float:
    """Where the logarithmic part of the curvature's axis begins: at a tenth of the smallest threshold."""
    return min((-c["threshold"] for run in runs for c in run.certificates if c.get("threshold")), default=1.0) / 10


def draw_certificate(certificate: dict[str, Any], profile: dict[str, Any]) -> Any:
    """Return a figure of a certificate (`Certificate.to_dict`): the loss along the escape direction (`distances` and
    `losses`), and the Ritz spectrum with the bounds on the smallest eigenvalue."""
    require("matplotlib", "plot", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(10.5, 4.2), layout="constrained")
        along, spectrum = figure.subplots(1, 2)
        _draw_profile(along, certificate, profile)
        _draw_spectrum(spectrum, certificate)
        figure.suptitle(f"{certificate['verdict']} (gradient norm {certificate['grad_norm']:.2e})", fontsize=11)
        return figure


def _draw_profile(axis: Any, certificate: dict[str, Any], profile: dict[str, Any]) -> None:
    s, losses = profile["distances"], profile["losses"]
    finite = [loss for loss in losses if loss is not None]
    slope, bend = certificate["slope"], certificate["lambda_min_upper"]
    model = [certificate["loss"] + slope * x + bend * x**2 / 2 for x in s]
    measured = [float("nan") if loss is None else loss for loss in losses]
    axis.plot(s, measured, color=_COLOURS[1], label="measured")
    axis.plot(s, model, color="grey", linestyle="--", linewidth=1.2, label="gradient and curvature at x")
    low, high = min(finite), max(finite)
    room = 0.25 * (high - low) or abs(high) or 1.0
    axis.set_ylim(low - room, high + room)  # the model may leave the picture
    axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    axis.set_xlabel("distance s along the escape direction v")
    axis.set_ylabel("loss f(x + s v)")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def _draw_spectrum(axis: Any, certificate: dict[str, Any]) -> None:
    """Ritz values with the start's share along each, a spectral density: shares add up to 1."""
    values, shares = certificate["ritz_values"], [max(share, 1e-9) for share in certificate["ritz_shares"]]
    axis.vlines(values, 1e-9, shares, color=_COLOURS[1], linewidth=1.8)
    axis.plot(values, shares, "o", color=_COLOURS[1], markersize=4, label="Ritz values")
    bounds = certificate["lambda_min_lower"], certificate["lambda_min_upper"]
    axis.axvspan(*bounds, color=_COLOURS[5], alpha=0.35, linewidth=0, label="smallest eigenvalue lies here")
    axis.axvline(certificate["threshold"], color=_COLOURS[2], linestyle="--", label="threshold of a saddle")
    axis.set_yscale("log")
    axis.set_ylim(bottom=min(*shares, 0.1) / 3)
    widest = max(values[-1] - values[0], abs(certificate["threshold"]))
    if widest > 20 * abs(values[0]):  # the interesting end would be a point
        axis.set_xscale("symlog", linthresh=max(abs(values[0]), abs(certificate["threshold"])))
    axis.set_xlabel("eigenvalue of the Hessian")
    axis.set_ylabel("share of a random direction")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def save(figure: Any, folder: Path, name: str = "figure") -> None:
    """Write NAME.png and NAME.svg into a folder."""
    figure.savefig(folder / f"{name}.png", dpi=150)
    figure.savefig(folder / f"{name}.svg", metadata=_NO_METADATA)


def to_svg(figure: Any) -> str:
    """Return a figure as an <svg> element to be put into a page."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=_NO_METADATA)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
