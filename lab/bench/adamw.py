"""Compressors behind DistributedDataParallel with AdamW: validation loss by learning rate, two workers, two buckets.

A character transformer of 0.36 million parameters on the reference of the Python language; warm-up and cosine decay.
The command line is that of lab/bench/rate_search.py:

    python -m lab.bench.adamw search --out experiments/adamw/runs.csv    # every method and rate, seed 0
    python -m lab.bench.adamw seeds --out experiments/adamw/runs.csv     # seeds 1 and 2 at each method's best rate
    python -m lab.bench.adamw table --out experiments/adamw/runs.csv     # print the results
"""

import statistics
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from lab.bench.rate_search import Job, RateSearch, append, rate_at
from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import Batches, load_data, make_task, shard
from packsaddle.comm import launch, process_group

METHODS = {
    "dense": None,
    "TopK 10%": (packsaddle.TopK(0.1), "bucket"),
    "TopK 10%, model scope": (packsaddle.TopK(0.1), "model"),
    "LowRank 4": (packsaddle.LowRank(4), "bucket"),
    "TopK 1%": (packsaddle.TopK(0.01), "bucket"),
    "TopK 1%, model scope": (packsaddle.TopK(0.01), "model"),
    "RandomK 10%": (packsaddle.RandomK(0.1), "bucket"),
    "QSGD": (packsaddle.QSGD(), "bucket"),
    "QSGD 127": (packsaddle.QSGD(127), "bucket"),
    "Sign": (packsaddle.Sign(), "bucket"),
}
WORKERS, BATCH = 2, 16
MODEL = ModelConfig("char-transformer", width=96, depth=3, heads=4)


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


def work(jobs: list[Job], out: str, steps: int) -> None:
    """Run the jobs sequentially; rank 0 writes a row after each."""
    with process_group():
        for job in jobs:
            row = train(*job, steps)
            if torch.distributed.get_rank() == 0:
                append(Path(out), row)


def main() -> None:
    assert __doc__
    search = RateSearch(
        __doc__,
        METHODS,
        (0.001, 0.002, 0.003, 0.006),
        ("kB_a_step", "kB a step"),
        Path("experiments/adamw/runs.csv"),
        steps=800,
    )
    search.main(
        lambda jobs, options: launch(work, (jobs, str(options.out), options.steps), WORKERS), lambda parser: None
    )


if __name__ == "__main__":
    main()
