"""Draw the energy kept at equal bytes, and the settings of sketches, from the CSV files of energy.py.

python -m lab.studies.shared_supports.figure energy.csv figure.png
"""

import csv
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

STYLE: dict[str, dict[str, Any]] = {
    "SharedTopK": {"color": "#0072B2", "marker": "o"},
    "SketchTopK": {"color": "#D55E00", "marker": "s"},
    "RandomK": {"color": "#777777", "marker": "^"},
}
GATHERED = {"2": "#00441b", "4": "#238b45", "16": "#74c476", "64": "#c7e9c0"}
MODELS = ("MNIST autoencoder", "ResNet-18, 8 channels", "char transformer")
MADE_UP = ("planted", "Gaussian", "Laplace", "Student t3")
DIMENSIONS = ("10000", "100000", "1000000", "10000000")
MIDDLE = "0.02"

Row = dict[str, str]


def select(rows: list[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def curve(axes: Any, rows: list[Row], **style: Any) -> None:
    """Energy kept against bytes; what is zero or less is drawn at the lower edge."""
    points = sorted((float(row["budget"]), max(float(row["kept"]), 1e-3)) for row in rows)
    if points:
        axes.plot(*zip(*points, strict=True), markersize=4, linewidth=1.3, **style)


def budgets(axes: Any, rows: list[Row], title: str, workers: str) -> None:
    """One panel: the contenders on the mean, and TopK gathered by 2 to 64 workers."""
    for w, color in GATHERED.items():
        curve(
            axes,
            select(rows, contender="TopK, gathered", workers=w),
            color=color,
            linestyle="--",
            label=f"TopK, gathered, W = {w}",
        )
    for name, style in STYLE.items():
        curve(axes, select(rows, contender=name, workers=workers), label=name, **style)
    axes.set(xscale="log", yscale="log", xlim=(0.004, 0.13), ylim=(1e-3, 1.3))
    axes.set_title(title, fontsize=8)


def settings(axes: Any, rows: list[Row], family: str) -> None:
    """One panel: the settings of a compressor at 2% of dense, on real corrected gradients and made-up vectors."""
    kinds = [(m, "iid", "True", "16", "") for m in MODELS] + [(m, "", "False", "1", "1000000") for m in MADE_UP]
    names: list[str] = []
    for row in rows:
        if row["contender"].startswith(family) and row["budget"] == MIDDLE and row["contender"] not in names:
            names.append(row["contender"])
    for i, name in enumerate(names):
        for j, (vector, split, corrected, workers, d) in enumerate(kinds):
            wanted = {"vector": vector, "split": split, "corrected": corrected, "workers": workers, "budget": MIDDLE}
            found = select(rows, contender=name, **wanted, **({"d": d} if d else {}))
            if found:
                color = plt.colormaps["tab10"](j)
                label = vector if i == 0 else None
                axes.plot(max(float(found[0]["kept"]), 1e-3), i, "o", color=color, markersize=5, label=label)
    axes.set_yticks(range(len(names)), [n.removeprefix(family).removeprefix(", ") or "defaults" for n in names])
    axes.set(xscale="log", xlim=(1e-3, 1.3), xlabel="energy kept")
    axes.invert_yaxis()
    axes.set_title(f"{family} at 2% of dense", fontsize=8)
    axes.grid(axis="y", alpha=0.3)


def draw(rows: list[Row], path: Path) -> None:
    figure, grid = plt.subplots(4, 4, figsize=(14, 14.5), layout="constrained")
    panels = [("iid", "False"), ("iid", "True"), ("by class", "False"), ("by class", "True")]
    for i, model in enumerate(MODELS):
        for axes, (split, corrected) in zip(grid[i], panels, strict=True):
            chosen = select(rows, vector=model, split=split, corrected=corrected)
            what = "corrected gradients" if corrected == "True" else "gradients"
            budgets(axes, chosen, f"{model}\n{what}, {split}", "16")
    for axes, vector in zip(grid[3], MADE_UP, strict=True):
        for d, line in zip(DIMENSIONS, (":", "-.", "--", "-"), strict=True):
            chosen = select(rows, vector=vector, d=d)
            for name, style in STYLE.items():
                label = f"{name}, d = {int(d):,}" if name == "SharedTopK" else None
                curve(axes, select(chosen, contender=name), label=label, linestyle=line, **style)
        axes.set(xscale="log", yscale="log", ylim=(1e-3, 1.3), xlabel="bytes a worker sends, of dense")
        axes.set_title(f"{vector}, one vector", fontsize=8)
    for row in grid:
        row[0].set_ylabel("energy of the mean kept")
    grid[1, 0].legend(fontsize=6)
    grid[3, 1].legend(fontsize=6)
    figure.savefig(path, dpi=80)
    second, pair = plt.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for axes, family in zip(pair, ("SketchTopK", "SharedTopK"), strict=True):
        settings(axes, rows, family)
    pair[1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    second.savefig(path.with_name("settings.png"), dpi=80)


if __name__ == "__main__":
    with open(sys.argv[1], newline="") as file:
        draw(list(csv.DictReader(file)), Path(sys.argv[2]))
