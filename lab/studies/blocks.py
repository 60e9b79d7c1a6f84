"""Summarise and draw the runs of blocks.sh: python -m lab.studies.blocks OUT, into experiments/blocks."""

import csv
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib.pyplot as plt

from lab.runs import Run, read_runs
from lab.runs.report import plateau

HERE = Path(__file__).parents[2] / "experiments" / "blocks"
SIZES = {"1": "1", "default": "2 (the default here)", "64": "64", "128": "128"}


def main() -> None:
    runs: dict[str, list[Run]] = {size: [] for size in SIZES}
    for run in read_runs(sorted(p for p in Path(sys.argv[1]).iterdir() if p.is_dir())):
        size = run.config["compressor"]["block_size"]
        runs["default" if size is None else str(size)].append(run)
    with (HERE / "table.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["block_size", "seed", "final_loss", "test_loss", "epochs_on_plateau", "payload"])
        for size in SIZES:
            for run in runs[size]:
                summary = run.summary or {}
                left = plateau(run.metrics, run.config["plateau"])[0]
                losses = [summary["final_loss"], summary["test_loss"]]
                table.writerow([size, run.config["seed"], *losses, left, summary["payload"]])
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (size, name), colour in zip(SIZES.items(), ("#000000", "#0072b2", "#d55e00", "#009e73"), strict=True):
        epochs = [line["epoch"] for line in runs[size][0].metrics]
        losses = list(zip(*([line["loss"] for line in run.metrics] for run in runs[size]), strict=True))
        axes.plot(epochs, [mean(values) for values in losses], color=colour, label=f"cells of {name}")
        axes.fill_between(epochs, [min(v) for v in losses], [max(v) for v in losses], color=colour, alpha=0.15, lw=0)
        final = [(run.summary or {})["final_loss"] for run in runs[size]]
        print(f"{name}: final loss {mean(final):.4f}, standard deviation {stdev(final):.4f} over {len(final)} seeds")
    axes.set(xlabel="epochs", ylabel="training loss", ylim=(0.02, 0.12))
    axes.legend(frameon=False)
    figure.savefig(HERE / "figure.png", dpi=150)


if __name__ == "__main__":
    main()
