"""Local updates with one worker of eight that sends wrong updates, with `Workers(clip=)` and without.

The last worker, for the whole run, or in one round only:

    shuffled labels   trains on its own images with their labels in random order
    times 100         sends 100 times its update, as after a unit error or a broken scaler
    times -1, -100    sends its update with the wrong sign, at the same or at 100 times the norm
    once times 1e4    sends 10,000 times its update in round 10 of 30, as after a flipped bit

Each worker trains a small network on its eighth of MNIST, 240 steps of AdamW with 32 images, and exchanges every 8
steps by the default compressor. "left out" is the training of the other seven. Workers are simulated in one process.

    python -m lab.bench.clip run --data-dir DIR     # the runs that experiments/clip/runs.csv does not have yet
    python -m lab.bench.clip table
"""

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import packsaddle
from lab.bench.rate_search import append
from lab.runs import DataConfig
from lab.runs.tasks import Batches, load_data, shard
from packsaddle.comm import resolve

WORKERS, STEPS, EVERY, BATCH, RATE = 8, 240, 8, 32, 2e-3
ONCE = 10  # the round of "once times 1e4", from 0
FACTORS = {"times 100": 100.0, "times -1": -1.0, "times -100": -100.0, "once times 1e4": 1e4}
FAULTS = ("none", "left out", "shuffled labels", *FACTORS)
CLIPS = (None, 2.0)
CPU = torch.device("cpu")


class WrongUpdate:
    """Multiplies the local update of each round, or of round `ONCE` only, before `LocalUpdates` sends it."""

    def __init__(self, optimizer: torch.optim.Optimizer, factor: float, *, once: bool) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.factor, self.once, self.steps = factor, once, 0
        self.start: list[torch.Tensor] = []
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_: Any) -> None:
        """Record where the local update starts."""
        if self.steps % EVERY == 0:
            self.start = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def after(self, *_: Any) -> None:
        """Multiply the local update after its last step."""
        self.steps += 1
        done, part = divmod(self.steps, EVERY)
        if part == 0 and (not self.once or done == ONCE + 1):
            for p, start in zip(self.parameters, self.start, strict=True):
                p.lerp_(start, 1 - self.factor)


def train(fault: str, clip: float | None, seed: int, data_dir: Path) -> dict[str, object]:
    """Train one worker, and return the row of the run, equal on all workers."""
    data, test = (load_data(DataConfig("mnist"), data_dir, train=part) for part in (True, False))
    rank, began = resolve(None).rank, time.perf_counter()
    is_faulty = rank == WORKERS - 1

    # Images and labels of this worker.
    mine = shard(data, "iid", worker=rank, workers=WORKERS, seed=seed)
    batches, labels = Batches(mine, BATCH, worker=rank, seed=seed), torch.zeros(len(data), dtype=torch.int64)
    labels[mine] = data.batch(mine, CPU)[1]
    if fault == "shuffled labels" and is_faulty:
        labels[mine] = labels[mine][torch.randperm(len(mine), generator=torch.Generator().manual_seed(seed))]

    # The network, from one seed on all workers, and its updates; the fault's hooks run before those of `LocalUpdates`.
    network = make_network(seed)
    optimizer = torch.optim.AdamW(network.parameters(), RATE)
    if fault in FACTORS and is_faulty:
        WrongUpdate(optimizer, FACTORS[fault], once=fault.startswith("once"))
    local = packsaddle.LocalUpdates(optimizer, every=EVERY, workers=packsaddle.Workers(clip=clip), model=network)

    for step in range(STEPS):
        index = batches[step]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(data.batch(index, CPU)[0]), labels[index]).backward()
        optimizer.step()
    factors = [c.factor for c in local.clips if c.worker == str(WORKERS - 1)]
    others = len(local.clips) - len(factors)
    pending = torch.tensor([float(local.pending().norm()) if is_faulty else 0.0])
    resolve(None).all_reduce(pending)
    local.flush(packsaddle.Identity())
    with torch.no_grad():
        inputs, targets = test.batch(torch.arange(len(test)), CPU)
        outputs = network(inputs)
    return {
        "fault": fault,
        "clip": clip or "",
        "seed": seed,
        "test_loss": round(float(torch.nn.functional.cross_entropy(outputs, targets)), 4),
        "test_accuracy": round(float((outputs.argmax(1) == targets).float().mean()), 4),
        "clipped_rounds": len(factors),
        "median_factor": f"{statistics.median(factors):.3g}" if factors else "",
        "clipped_rounds_of_others": others,
        "pending_norm": f"{float(pending):.3g}",
        "s": round(time.perf_counter() - began, 1),
    }


def make_network(seed: int) -> torch.nn.Module:
    """Return a network of one hidden layer, by a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = torch.nn.Linear(784, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10)
        return torch.nn.Sequential(torch.nn.Flatten(), *layers)


def read(out: Path) -> list[dict[str, str]]:
    """Return the rows of a file, [] if it does not exist."""
    if not out.exists():
        return []
    with out.open() as file:
        return list(csv.DictReader(file))


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table: the mean over seeds, with its range, by fault and clip."""
    heads = ["no clip" if clip is None else f"clip={clip:g}" for clip in CLIPS]
    lines = ["| the eighth worker | " + " | ".join(heads) + " |", "| --- " * (1 + len(heads)) + "|"]
    for fault in FAULTS:
        cells = []
        for clip in CLIPS:
            found = [row for row in rows if row["fault"] == fault and row["clip"] == str(clip or "")]
            losses = [float(row["test_loss"]) for row in found]
            right = statistics.fmean(float(row["test_accuracy"]) for row in found) if found else 0.0
            cells.append(
                f"{statistics.fmean(losses):.3g} ({min(losses):.3g} to {max(losses):.3g}), {right:.1%}"
                if losses
                else "-"
            )
        lines.append(f"| {fault} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data-dir", type=Path, default=Path("data"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("experiments/clip/runs.csv"))
    args = parser.parse_args()
    if args.command == "table":
        print(table(read(args.out)))
        return
    torch.set_num_threads(1)
    done = {(row["fault"], row["clip"], row["seed"]) for row in read(args.out)}
    for seed in args.seeds:
        for fault in FAULTS:
            for clip in CLIPS:
                if (fault, str(clip or ""), str(seed)) not in done:
                    workers = WORKERS - (fault == "left out")
                    found = packsaddle.simulate(
                        lambda _, f=fault, c=clip, s=seed: train(f, c, s, args.data_dir), workers
                    )
                    append(args.out, found[0])


if __name__ == "__main__":
    main()
