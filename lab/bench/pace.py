"""Examples a second of workers of unequal speeds: equal steps, paces, batches by speed, DDP, and the fastest alone.

    torchrun --nproc-per-node 2 -m lab.bench.pace 1 0.333 --out experiments/pace/speeds.csv
    torchrun --nproc-per-node 4 -m lab.bench.pace 1 1 1 0.25 --out experiments/pace/speeds.csv

A step sleeps in place of computing, so that workers on few cores do not disturb each other; the network is small.
Numbers are of all workers together, from the fourth round on, before which paces are chosen; the sum is that of the
speeds of workers that train at the same time without exchanges.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from lab.bench.rows_file import add_rows

EXAMPLE = 0.08  # seconds of an example at speed 1
BATCH, EVERY, WARM = 8, 8, 3  # examples of a step; steps of a round; rounds before the clock starts
WAYS = ("without exchanges", "equal steps", "paces", "batches by speed", "DDP", "the fastest alone")


def measure(way: str, speeds: list[float], rounds: int) -> tuple[float, str]:
    """Train for some rounds; return the examples a second of all workers, and their steps in a round."""
    rank, speed = dist.get_rank(), speeds[dist.get_rank()]
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batch = round(BATCH * speed / min(speeds)) if way == "batches by speed" else BATCH
    weights: dict[str, Any] = {"paces": "steps", "batches by speed": batch}
    local = None
    if way == "DDP":
        model = DistributedDataParallel(model)
    elif way not in ("the fastest alone", "without exchanges"):
        workers = packsaddle.Workers(weight=weights.get(way))
        local = packsaddle.LocalUpdates(optimizer, every=EVERY, model=model, workers=workers)

    # Count the examples of this worker from the end of the warm-up on.
    rng, start, n, steps = torch.Generator().manual_seed(rank), 0.0, 0, 0
    while (done := steps // EVERY if local is None else local.rounds) < rounds + WARM:
        if done == WARM and not start:
            start, n = time.perf_counter(), 0
        if rank and way == "the fastest alone":
            break
        time.sleep(batch * EXAMPLE / speed)
        x = torch.randn(batch, 64, generator=rng)
        loss: Any = nn.functional.mse_loss(model(x), x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        n, steps = n + batch, steps + 1
    found = torch.tensor(n / (time.perf_counter() - start) if n else 0.0)
    dist.all_reduce(found)
    if local is not None:
        local.flush()
    return float(found), "" if local is None else " ".join(map(str, local.paces))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speeds", type=float, nargs="+", help="of each worker, relative to the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a CSV file, to which rows are added")
    arguments = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    limit = 0.0
    for way in WAYS:
        found, steps = measure(way, arguments.speeds, arguments.rounds)
        limit = limit or found
        row = {
            "speeds": " ".join(f"{speed:g}" for speed in arguments.speeds),
            "way": way,
            "steps_in_a_round": steps,
            "examples_a_second": f"{found:.1f}",
            "of_the_sum": f"{found / limit:.3f}",
        }
        if dist.get_rank() == 0:
            print(row, flush=True)
            add_rows(arguments.out, [row]) if arguments.out else None
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
