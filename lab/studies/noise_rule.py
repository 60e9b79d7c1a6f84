"""Summarise and draw the runs of noise_rule.sh, into experiments/noise-rule.

python -m lab.studies.noise_rule OUT DATA_DIR
"""

import csv
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import torch

from lab.runs import Run, read_config, read_runs
from lab.runs.report import row
from lab.runs.tasks import Task, load_data, make_task, task_loss
from packsaddle import gradient_noise
from packsaddle.numerics import Stream, mix
from packsaddle.theory import Walk, rms

HERE = Path(__file__).parents[2] / "experiments" / "noise-rule"
COLUMNS = ("eta", "r", "seed", "final_loss", "test_loss", "epochs_on_plateau", "still_since", "walk")


def main() -> None:
    runs = [run for run in read_runs([Path(sys.argv[1])]) if run.summary]
    runs.sort(key=lambda run: (-run.config["lr"], run.config["noise"]["std"], run.config["seed"]))
    with (HERE / "table.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(COLUMNS)
        for run in runs:
            found, c = row(run), run.config
            losses = [found.final_loss, found.test_loss, found.plateau_epochs, found.still_since]
            table.writerow([c["lr"], c["noise"]["std"], c["seed"], *losses, f"{walk(run):.3g}"])
    for run in runs:
        if run.config["noise"]["std"] == 0 and run.config["seed"] == 0:
            for where in ("start", "end"):
                print(f"eta {run.config['lr']}, {where}: {measured(run, where)}")
    draw(runs)


def start(run: Run) -> Task:
    """The network at x_0."""
    config = read_config(run.path)
    return make_task(config.model, torch.Size((1, 28, 28)), 10, mix(config.seed, int(Stream.INIT)) >> 33)


def walk(run: Run) -> float:
    """How far the noise carries x over the run, beside x_0."""
    steps = (run.summary or {})["steps"]
    return Walk(run.config["lr"], steps, rms(start(run))).times(run.config["noise"]["std"])


def measured(run: Run, where: str) -> str:
    """The noise of 64 mini-batches at the start or the end of a run."""
    config, task = read_config(run.path), start(run)
    data = load_data(config.data, Path(sys.argv[2]), train=True)
    if where == "end":
        task.network.load_state_dict(torch.load(run.path / "checkpoint" / "model.pt", weights_only=True))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[: 64 * config.batch_size]
    read = [data.batch(index, torch.device("cpu")) for index in order.split(config.batch_size)]
    found = gradient_noise(task, task_loss, read)
    multiples = ", ".join(f"{r:g}: {found.times(r):,.0f}" for r in (1e-4, 3e-4, 1e-3, 3e-3, 1e-2))
    return (
        f"sqrt(E||g - grad f||^2) = {found.std:.2e} (error {found.std_error:.0e}); r as a multiple of it: {multiples}"
    )


def draw(runs: list[Run]) -> None:
    figure, (along, final) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    shades = plt.get_cmap("viridis_r").resampled(6).colors
    colours = dict(zip(("0", "0.0001", "0.0003", "0.001", "0.003", "0.01"), shades, strict=True))
    kept = [run for run in runs if run.config["lr"] == 1.0]
    for run in kept:
        name = f"{run.config['noise']['std']:g}"
        shown = name if run.config["seed"] == 0 else None
        epochs, losses = [m["epoch"] for m in run.metrics], [m["loss"] for m in run.metrics]
        along.plot(epochs, losses, color=colours[name], lw=1.2, alpha=0.9, label=shown)
    along.axhline(0.0867, color="grey", lw=1, ls=":")
    along.set(xlabel="epochs", ylabel="training loss", ylim=(0.05, 0.18))
    along.legend(title="r (eta = 1)", frameon=False)
    for lr, marker in ((1.0, "o"), (0.25, "s")):
        part = [run for run in runs if run.config["lr"] == lr and run.config["noise"]["std"] > 0]
        x = [walk(run) for run in part]
        final.plot(x, [row(run).final_loss for run in part], marker, label=f"eta = {lr}", alpha=0.7)
    without = [row(run).final_loss for run in kept if run.config["noise"]["std"] == 0]
    final.axhline(mean(v for v in without if v is not None), color="black", lw=1, ls="--", label="mean without noise")
    final.set(xscale="log", xlabel="eta r sqrt(T) / rms of x_0", ylabel="final training loss")
    final.legend(frameon=False)
    figure.savefig(HERE / "figure.png", dpi=130)


if __name__ == "__main__":
    main()
