"""Compressors behind DistributedDataParallel with AdamW: validation loss by learning rate, two workers, two buckets.

A character transformer of 0.36 million parameters on the reference of the Python language; warm-up and cosine decay.
Rows go to a CSV file as runs finish, and a run that is in it is not made again:

    python benchmarks/adamw.py search --out experiments/adamw/runs.csv    # every method and rate, seed 0
    python benchmarks/adamw.py seeds --out experiments/adamw/runs.csv     # seeds 1 and 2 at each method's best rate
    python benchmarks/adamw.py table --out experiments/adamw/runs.csv     # what the runs say
"""

import argparse
import csv
import math
import statistics
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from packsaddle.comm import process_group
from packsaddle.comm.launch import launch
from packsaddle.experiments import DataConfig, ModelConfig
from packsaddle.experiments.tasks import Batches, load_data, make_task, shard

METHODS = {
    "dense": None,
    "TopK 10%": (packsaddle.TopK(0.1), "bucket"),
    "TopK 10%, model scope": (packsaddle.TopK(0.1), "model"),
    "LowRank 4": (packsaddle.LowRank(4), "bucket"),
    "TopK 1%": (packsaddle.TopK(0.01), "bucket"),
    "TopK 1%, model scope": (packsaddle.TopK(0.01), "model"),
    "RandomK 10%": (packsaddle.RandomK(0.1), "bucket"),
    "QSGD": (packsaddle.QSGD(), "bucket"),
    "Sign": (packsaddle.Sign(), "bucket"),
}
RATES = (0.001, 0.002, 0.003, 0.006)
WORKERS, BATCH, STEPS, WARM_UP = 2, 16, 800, 50
MODEL = ModelConfig("char-transformer", width=96, depth=3, heads=4)
FIELDS = ("method", "rate", "seed", "steps", "validation_loss", "training_loss", "kB_a_step", "buckets", "ms_a_step")


def rate_at(step: int, steps: int) -> float:
    """Return the share of the peak rate: linear warm-up, then a cosine to a tenth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP)))


def train(method: str, rate: float, seed: int, steps: int) -> dict[str, object]:
    """Train one model on this worker's shard and return its row."""
    group, cpu = torch.distributed.group.WORLD, torch.device("cpu")
    rank, workers = group.rank(), group.size()
    data, held_out = (load_data(DataConfig("text"), None, train=part) for part in (True, False))
    model = DistributedDataParallel(make_task(MODEL, data.shape, data.classes, seed=seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    hook = None
    if (chosen := METHODS[method]) is not None:
        hook = packsaddle.register_ddp_hook(model, chosen[0], scope=chosen[1], optimizer=optimizer)
    mine = shard(data, "iid", worker=rank, workers=workers, seed=seed)
    batches, losses, start = Batches(mine, BATCH, worker=rank, seed=seed), [], time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(*data.batch(batches[step], cpu))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    taken = time.perf_counter() - start
    with torch.no_grad():
        windows = torch.arange(0, len(held_out)).split(256)
        found = [float(model.module(*held_out.batch(index, cpu))) * len(index) for index in windows]
    moved = hook.ledger.total.payload if hook else hook_free_bytes(model, steps)
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "validation_loss": round(sum(found) / len(held_out), 4),
        "training_loss": round(statistics.fmean(losses[-max(1, steps // 10) :]), 4),
        "kB_a_step": round(moved / steps / 1e3, 1),
        "buckets": len(model._get_ddp_logging_data().get("rebuilt_bucket_sizes", "").split(",")),
        "ms_a_step": round(1e3 * taken / steps, 1),
    }


def hook_free_bytes(model: DistributedDataParallel, steps: int) -> int:
    """Return the bytes of all gradients."""
    return steps * sum(p.numel() * p.element_size() for p in model.parameters())


def work(jobs: list[tuple[str, float, int]], out: str, steps: int) -> None:
    """Make the runs one after the other; rank 0 writes a row as each is done."""
    with process_group():
        for job in jobs:
            row = train(*job, steps)
            if torch.distributed.get_rank() == 0:
                append(Path(out), row)
                print(row, flush=True)


def append(out: Path, row: dict[str, object]) -> None:
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def read(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(out.open())) if out.exists() else []


def best_rate(rows: list[dict[str, str]], method: str) -> float:
    """Return the rate of the least validation loss of seed 0."""
    mine = [row for row in rows if row["method"] == method and row["seed"] == "0"]
    return float(min(mine, key=lambda row: float(row["validation_loss"]))["rate"])


def table(rows: list[dict[str, str]]) -> str:
    """Return the Markdown table: seed 0 by rate, and mean and range over seeds at the rate whose mean is least."""
    lines = [
        "| method | kB a step | " + " | ".join(f"{rate:g}" for rate in RATES) + " | best rate: mean, range, seeds |",
        "| --- " * (len(RATES) + 3) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        by_rate = {
            rate: [float(row["validation_loss"]) for row in mine if float(row["rate"]) == rate] for rate in RATES
        }
        first = {float(row["rate"]): float(row["validation_loss"]) for row in mine if row["seed"] == "0"}
        most = max(map(len, by_rate.values()))
        best = min((rate for rate in RATES if len(by_rate[rate]) == most), key=lambda r: statistics.fmean(by_rate[r]))
        losses = by_rate[best]
        spread = f"{best:g}: {statistics.fmean(losses):.3f}, {min(losses):.3f} to {max(losses):.3f}, {len(losses)}"
        cells = [f"{first[rate]:.3f}" if rate in first else "-" for rate in RATES]
        lines.append(f"| {method} | {mine[0]['kB_a_step']} | {' | '.join(cells)} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("search", "seeds", "table"))
    parser.add_argument("--out", type=Path, default=Path("experiments/adamw/runs.csv"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, help="by default all, and for seeds each method's best")
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    rows = read(options.out)
    if options.command == "table":
        print(table(rows))
        return
    done = {(row["method"], float(row["rate"]), int(row["seed"])) for row in rows}
    if options.command == "search":
        jobs = [(method, rate, 0) for method in options.methods for rate in options.rates or RATES]
    else:
        rates = {method: options.rates or [best_rate(rows, method)] for method in options.methods}
        jobs = [(method, rate, seed) for method in options.methods for rate in rates[method] for seed in (1, 2)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    launch(work, ([job for job in jobs if job not in done], str(options.out), options.steps), WORKERS)


if __name__ == "__main__":
    main()
