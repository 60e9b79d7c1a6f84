"""The figure of a certificate, i.e. of the evidence on whether the parameters of a model are a saddle or a minimum: the
loss along the directions of least and largest curvature, and the Ritz values of the Hessian."""

from pathlib import Path
from typing import Any

from packsaddle.errors import require

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
    "svg.hashsalt": "packsaddle",  # fixed seed of the ids in SVG files, which makes the files reproducible
}
NO_METADATA = {"Date": None, "Creator": None}
# Okabe and Ito's palette, which color-blind readers can distinguish. Black comes first, for the baseline of a figure.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00")
_LEAST_SHARE = 1e-9  # lower end of the y axis in the plot of Ritz values


def draw_certificate(certificate: dict[str, Any]) -> Any:
    """Return a matplotlib figure of a certificate, which is given as the result of `Finding.to_dict`.

    The first panel shows the loss along the escape direction, i.e. the direction of the least curvature found. If the
    direction of the largest curvature is known, the next panel shows the loss along it. The last panel shows the Ritz
    values, and the bounds on the Hessian's extreme eigenvalues.
    """
    require("matplotlib", "plot", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    sharpest = certificate["sharpest_profile"]
    # After only one Hessian-vector product the escape direction v is still the random start vector, and a single Ritz
    # value says little of the eigenvalues.
    random = len(certificate["ritz_values"]) == 1
    panels = 1 + (sharpest is not None) + (not random)

    # Draw the panels from the left: the loss along the escape direction v, the loss along the sharpest direction w, and
    # the Ritz values.
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.2 * panels, 4.2), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        name = "a random direction v" if random else "the escape direction v"
        _draw_profile(axes[0], certificate, certificate["profile"], name, has_model=True)
        if sharpest is not None:
            _draw_profile(axes[1], certificate, sharpest, "the sharpest direction w", has_model=False)
        if not random:
            _draw_ritz_values(axes[-1], certificate)
        title = f"{certificate['verdict']} (gradient norm {certificate['grad_norm']:.3e})"
        figure.suptitle(title, fontsize=11, wrap=True)
        return figure


def _draw_profile(
    axis: Any, certificate: dict[str, Any], profile: dict[str, Any], along: str, *, has_model: bool
) -> None:
    s, losses = profile["distances"], profile["losses"]
    letter = along.split("direction ")[1][0]
    finite = [loss for loss in losses if loss is not None]
    measured = [float("nan") if loss is None else loss for loss in losses]
    examples = profile["examples"]
    part = "" if examples == certificate["examples"] else f" on {examples:,} of the examples"
    axis.plot(s, measured, color=COLOURS[1], label=f"measured{part}")

    # Draw the quadratic model f(x) + slope s + bend s^2 / 2, where slope and bend are the first and the second
    # derivative of the loss along the direction at x.
    here = losses[len(losses) // 2]
    if has_model and here is not None:
        slope, bend = certificate["slope"], certificate["lambda_min_upper"]
        model = [here + slope * x + bend * x**2 / 2 for x in s]
        axis.plot(s, model, color="grey", linestyle="--", linewidth=1.2, label="gradient and curvature at x")
    low, high = min(finite), max(finite)
    room = 0.25 * (high - low) or abs(high) or 1.0
    # Fit the y axis to the measured losses. The curve of the quadratic model may extend beyond the axis.
    axis.set_ylim(low - room, high + room)
    axis.axvline(0, color="grey", linewidth=0.8, linestyle=":")
    axis.locator_params(axis="x", nbins=6)
    axis.set_xlabel(f"distance s along {along}")
    axis.set_ylabel(f"loss f(x + s {letter})")
    _legend(axis)


def _draw_ritz_values(axis: Any, certificate: dict[str, Any]) -> None:
    """Draw a vertical line at each Ritz value, the certificate's bounds on the smallest and the largest eigenvalue, and
    its threshold if it has an epsilon. A line's height is the squared component, along the value's Ritz vector, of the
    random vector from which Lanczos started."""
    values = certificate["ritz_values"]
    shares = [max(share, _LEAST_SHARE) for share in certificate["ritz_shares"]]
    examples = certificate["sample_examples"]
    of_sample = "" if examples is None else f", over {examples:,} of the examples"
    axis.vlines(values, _LEAST_SHARE, shares, color=COLOURS[1], linewidth=1.8)
    axis.plot(values, shares, "o", color=COLOURS[1], markersize=4, label=f"Ritz values{of_sample}")
    axis.set_yscale("log")
    axis.set_ylim(bottom=min(*shares, 0.1) / 3)
    axis.set_ylabel("share of a random direction")

    # Draw the bounds on the extreme eigenvalues, and the threshold: the point is a saddle if the smallest eigenvalue is
    # below it.
    for end, colour in (("min", COLOURS[5]), ("max", COLOURS[3])):
        low, high = certificate[f"lambda_{end}_lower"], certificate[f"lambda_{end}_upper"]
        if low is not None and high is not None:
            axis.axvspan(low, high, color=colour, alpha=0.35, linewidth=1, label=f"lambda_{end} lies here")
        elif end == "min":
            axis.axvline(high, color=colour, label="lambda_min is at most this")
    threshold = certificate["threshold"]
    if threshold is not None:
        axis.axvline(threshold, color=COLOURS[2], linestyle="--", label="threshold of a saddle")

    # Use a logarithmic axis if on a linear one the smallest eigenvalue would be hard to distinguish from 0.
    least, largest = values[0], values[-1]
    near = max(abs(least), abs(threshold or 0.0))
    if near and max(largest - least, near) > 20 * abs(least):
        axis.set_xscale("symlog", linthresh=near, linscale=0.5)
        axis.margins(x=0.08)
        axis.xaxis.get_major_locator().set_params(numticks=7)
    axis.set_xlabel("eigenvalue of the Hessian")
    _legend(axis)


def _legend(axis: Any) -> None:
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9)


def save(figure: Any, folder: Path, name: str = "figure") -> None:
    figure.savefig(folder / f"{name}.png", dpi=150)
    # Keep the layout of the PNG file for the SVG file, since computing it again takes as long as drawing the figure.
    figure.set_layout_engine("none")
    figure.savefig(folder / f"{name}.svg", metadata=NO_METADATA)
