"""Draw the tables that diagnostics.py writes, one panel per idea.

python -m lab.studies.diagnostics_figure DIR
"""

import csv
import sys
from pathlib import Path
from typing import Any

from packsaddle.errors import require

# Okabe and Ito's palette, distinguishable by colour-blind readers; line styles say it again.
STYLES: dict[str, dict[str, Any]] = {
    "Identity": {"color": "#000000", "linestyle": "-", "marker": "o"},
    "RandomK": {"color": "#0072B2", "linestyle": "-", "marker": "s"},
    "TopK": {"color": "#D55E00", "linestyle": "--", "marker": "^"},
    "LinearSketch": {"color": "#56B4E9", "linestyle": "-.", "marker": "D"},
    "Sign": {"color": "#009E73", "linestyle": ":", "marker": "v"},
    "no noise": {"color": "#CC79A7", "linestyle": ":", "marker": "X"},
    "RandomK, k = 1": {"color": "#E69F00", "linestyle": "-", "marker": "P"},
}
REFERENCE = {"color": "grey", "linewidth": 1.2}


def read(path: Path, by: str = "compressor") -> dict[str, dict[str, list[float]]]:
    """Return a table's columns, grouped by the value of the column `by`."""
    groups: dict[str, dict[str, list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            columns = groups.setdefault(row.pop(by), {name: [] for name in row})
            for name, value in row.items():
                columns[name].append(float(value))
    return groups


def line(name: str) -> dict[str, Any]:
    """Return the style of a curve without markers."""
    return {k: v for k, v in STYLES[name].items() if k != "marker"}


def coupling(axis: Any, folder: Path) -> None:
    for name, table in read(folder / "coupling.csv").items():
        axis.fill_between(table["step"], table["gap_10"], table["gap_90"], color=STYLES[name]["color"], alpha=0.12)
        axis.plot(table["step"], table["gap"], label=name, **line(name))
    early = [(t, p) for t, p in zip(table["step"], table["predicted_median"], strict=True) if 0 < p < 3]
    axis.plot(*zip(*early, strict=True), label="predicted, no compression", linestyle=":", zorder=5, **REFERENCE)
    axis.set(yscale="log", ylim=(1e-5, 10), xlabel="steps", ylabel=r"$|\langle v_1, x_t - x'_t\rangle|$")
    axis.set_title("Coupling: opposite noise along $v_1$\ngrows exponentially")


def localisation(axis: Any, folder: Path) -> None:
    for name, table in read(folder / "localisation.csv").items():
        axis.plot(table["step"], table["moved"], label=name, **line(name))
        axis.plot(table["step"], table["bound"], alpha=0.45, linewidth=1.2, color=STYLES[name]["color"])
    axis.plot([], [], color="grey", alpha=0.6, linewidth=1.2, label="bounds for c = 1")
    axis.set(yscale="log", ylim=(1e-5, 50), xlabel=r"$\tau$, steps", ylabel=r"$\|y_\tau - y_0\|^2$")
    axis.set_title("Improve or localise:\nwho moves far has improved")


def error(axis: Any, folder: Path) -> None:
    for name, table in read(folder / "error.csv").items():
        se = [2 * v for v in table["standard_error"]]
        low = [m - s for m, s in zip(table["mean"], se, strict=True)]
        high = [m + s for m, s in zip(table["mean"], se, strict=True)]
        axis.fill_between(table["step"], low, high, color=STYLES[name]["color"], alpha=0.2)
        axis.plot(table["step"], table["mean"], label=name, **line(name))
    axis.plot(table["step"], table["exact_random_k"], linestyle=":", label="RandomK, exact", zorder=5, **REFERENCE)
    axis.plot(table["step"], table["bound"], label="bound", **REFERENCE)
    axis.set(xlabel="steps", ylabel=r"$E\|e_t\|^2 / \|g\|^2$", ylim=(0, 280))
    axis.set_title("Lemma A.5: error memory,\nconstant gradient, $\\mu = 1/8$")


def sensitivity(axis: Any, folder: Path) -> None:
    for name, table in read(folder / "sensitivity.csv").items():
        size = 5 if name == "LinearSketch" else 8  # it lies on RandomK
        axis.plot(table["noise"], table["e_gap"], label=name, markersize=size, **STYLES[name])
    axis.set(
        xscale="log", yscale="log", xlabel="r, noise per coordinate", ylabel=r"$\|e_t - e'_t\|$, rms over 100 steps"
    )
    axis.set_title("Linear compressors keep small\ndifferences small, TopK does not")


def escapes(axis: Any, folder: Path) -> None:
    tables = read(folder / "escapes.csv")
    for i, (name, table) in enumerate(tables.items()):
        for j in range(len(table["eta"])):
            unit, x = table["predicted"][j], i + 0.3 * j - 0.15
            median, low, high = (table[key][j] / unit for key in ("median", "q10", "q90"))
            fill = {"markerfacecolor": "white"} if j else {}
            bars = [[median - low], [high - median]]
            axis.errorbar(
                x, median, bars, color=STYLES[name]["color"], marker=STYLES[name]["marker"], capsize=3, **fill
            )
            predicted = table["predicted_with_mu"][j] / unit
            axis.plot([x - 0.13, x + 0.13], [predicted, predicted], color="#CC79A7", linewidth=2, zorder=5)
    eta = table["eta"]
    axis.plot([], [], "ko", label=rf"$\eta$ = {eta[0]:g}, 10% to 90%")
    axis.plot([], [], "ko", markerfacecolor="white", label=rf"$\eta$ = {eta[1]:g}")
    axis.plot([], [], color="#CC79A7", linewidth=2, label=r"predicted median with $\mu$")
    axis.set_xticks(range(len(tables)), [name.replace(", ", "\n") for name in tables])
    axis.set(ylabel="escape time / predicted for Identity", ylim=(0.8, 2.1))
    axis.set_title("Escape times:\ncompression costs less as $\\eta \\to 0$")


def octopus(axis: Any, folder: Path) -> None:
    for i, (name, table) in enumerate(read(folder / "octopus.csv", by="method").items()):
        leg = [n + 0.07 * (i - 2) * (i > 0) for n in table["leg"]]  # side by side
        label = "Identity, no noise" if name == "no noise" else name
        bars = [
            [m - q for m, q in zip(table["step"], table["step_10"], strict=True)],
            [q - m for m, q in zip(table["step"], table["step_90"], strict=True)],
        ]
        axis.errorbar(leg, table["step"], bars, label=label, capsize=3, **STYLES[name])
    axis.set(yscale="log", xlabel="saddle", ylabel="steps until it is left", xticks=[1, 2, 3, 4])
    axis.set_title("Octopus: exactly d = 4 escapes,\nequally long with noise")


def draw(folder: Path) -> None:
    """Write figure.png from the tables of a folder."""
    require("matplotlib", "lab", "drawing figures")
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
    style |= {"axes.axisbelow": True, "axes.titlesize": 11, "legend.frameon": False, "legend.fontsize": 8}
    with mpl.rc_context(style):
        figure = Figure(figsize=(13, 7.6), layout="constrained")
        panels = (coupling, localisation, error, sensitivity, escapes, octopus)
        for axis, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
            panel(axis, folder)
            axis.legend(**({"loc": "upper left", "ncols": 2} if panel is error else {}))
        figure.savefig(folder / "figure.png", dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
