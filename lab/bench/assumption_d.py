"""Assumption D of the paper: which fraction of the coordinates has half of the energy of the compressed vector v?

AdaptiveTopK(1/2) keeps the smallest k with ||v - C(v)||^2 <= ||v||^2 / 2 at every step. The MNIST autoencoder of
Figure 2 is trained on one worker, with the paper's noise and without:

    python -m lab.bench.assumption_d --data-dir DIR [--steps 2814] [--out experiments/theorem/assumption_d.csv]

Gaussian noise alone needs the fraction 2 Q(z) of the coordinates, where z phi(z) + Q(z) = 1/4: 12.4%.
"""

import argparse
import csv
import statistics
from pathlib import Path

import torch
from scipy.optimize import brentq
from scipy.stats import norm

from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import Batches, load_data, make_task, shard
from packsaddle import AdaptiveTopK, CompressedSGD, Compression, Message

ETA, BATCH, NOISES = 0.1, 64, (0.0, 0.001, 0.01)


def of_gaussians() -> float:
    """Return the fraction of a Gaussian vector's coordinates that has half of its energy, for d to infinity."""
    z = brentq(lambda z: z * norm.pdf(z) + norm.sf(z) - 1 / 4, 0, 4)
    return float(2 * norm.sf(z))


def shares(noise: float, steps: int, data_dir: Path, seed: int) -> list[float]:
    """Train, and return k/d for each step."""
    data = load_data(DataConfig("mnist"), data_dir, train=True)
    model = make_task(ModelConfig("mnist-autoencoder"), data.shape, data.classes, seed=seed)
    found: list[int] = []

    class Counted(AdaptiveTopK):
        def encode(self, v: torch.Tensor, *, seed: int, step: int) -> Message:
            message = super().encode(v, seed=seed, step=step)
            found.append(len(message.parts["values"]))
            return message

    everything = Compression(Counted(0.5), dense_below=0)
    optimizer = CompressedSGD(model.parameters(), ETA, everything, noise=noise, seed=seed)
    batches = Batches(shard(data, "iid", worker=0, workers=1, seed=seed), BATCH, worker=0, seed=seed)
    for step in range(steps):
        optimizer.zero_grad()
        model(*data.batch(batches[step], torch.device("cpu"))).backward()
        optimizer.step()
    return [k / optimizer.numel for k in found]


def main() -> None:
    """Print and write the median k/d over tenths of the run, by noise."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2814, help="by default three epochs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"Gaussian vector: {of_gaussians():.4f}")
    rows = []
    for noise in NOISES:
        found = shares(noise, options.steps, options.data_dir, options.seed)
        tenth = max(1, len(found) // 10)
        for begin in range(0, len(found), tenth):
            part = sorted(found[begin : begin + tenth])
            row = {"noise": noise, "step": begin, "median": round(statistics.median(part), 5)}
            rows.append(row | {"least": round(part[0], 5), "most": round(part[-1], 5)})
            print(rows[-1], flush=True)
    if options.out:
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
