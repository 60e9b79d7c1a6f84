"""Local updates with AdamW, compared with gradients at every step: validation loss by learning rate and bytes.

The character transformer of lab/bench/adamw.py (0.36 million parameters, the reference of the Python language; warm-up
and cosine decay), four workers, 32 windows per step for all methods, so equal tokens. Workers are simulated in one
process (see `packsaddle.simulate`), except with a hook, where they are gloo processes. The command line is that of
lab/bench/rate_search.py:

    python -m lab.bench.local_updates search    # every method and rate, seed 0
    python -m lab.bench.local_updates seeds     # seeds 1 and 2 at each method's best rate
    python -m lab.bench.local_updates table     # print the results
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

import packsaddle
from lab.bench.rate_search import Job, RateSearch, append, rate_at
from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import Batches, load_data, make_task, shard
from packsaddle.comm import launch, process_group, resolve


def nesterov(anchors: list[Any]) -> torch.optim.Optimizer:
    """Return DiLoCo's outer optimizer (Douillard et al. 2023)."""
    return torch.optim.SGD(anchors, lr=0.7, momentum=0.9, nesterov=True)


@dataclass(frozen=True)
class Method:
    """The exchange of a method: gradients behind a `hook`, if given, or local updates, if `every` is given."""

    compressor: packsaddle.Compressor | None = None
    every: int | None = None
    outer: Callable[[list[Any]], torch.optim.Optimizer] | None = None
    decay: float = 1.0
    fragments: int = 1
    delay: int = 0
    keep: bool = False


METHODS = {
    "dense, every step": Method(),
    "hook, TopK 10%": Method(packsaddle.TopK(0.1)),
    "hook, TopK 1%": Method(packsaddle.TopK(0.01)),
    "DiLoCo, 8": Method(packsaddle.Identity(), 8, nesterov),
    "DiLoCo, 30": Method(packsaddle.Identity(), 30, nesterov),
    "mean of 8": Method(packsaddle.Identity(), 8),
    "mean of 30": Method(packsaddle.Identity(), 30),
    "local 8, TopK 1/32 int2": Method(packsaddle.TopK(1 / 32, values="int2"), 8),
    "local 30, TopK 1/32 int2": Method(packsaddle.TopK(1 / 32, values="int2"), 30),
    "local 8, TopK 1/48 int2": Method(packsaddle.TopK(1 / 48, values="int2"), 8),
    "local 8, TopK 1/32 int2, kept": Method(packsaddle.TopK(1 / 32, values="int2"), 8, keep=True),
    "local 30, TopK 1/32 int2, kept": Method(packsaddle.TopK(1 / 32, values="int2"), 30, keep=True),
    "local 8, TopK 1/48 int2, kept": Method(packsaddle.TopK(1 / 48, values="int2"), 8, keep=True),
    "local 30, TopK 1/48 int2, kept": Method(packsaddle.TopK(1 / 48, values="int2"), 30, keep=True),
    "local 8, TopK 1/48 float32, kept": Method(packsaddle.TopK(1 / 48), 8, keep=True),
    "local 8, TopK 1/48 chunks int2, kept": Method(packsaddle.TopK(1 / 48, values="int2", chunk=4096), 8, keep=True),
    "local 8, Sign, kept": Method(packsaddle.Sign(per_tensor=True), 8, keep=True),
    "local 30, Sign, kept": Method(packsaddle.Sign(per_tensor=True), 30, keep=True),
    "local 8, TopK 1/16 int2": Method(packsaddle.TopK(1 / 16, values="int2"), 8),
    "local 8, TopK 1/32 int8": Method(packsaddle.TopK(1 / 32, values="int8"), 8),
    "local 30, TopK 1/32 int8": Method(packsaddle.TopK(1 / 32, values="int8"), 30),
    "local 8, TopK 1/32 int8, Nesterov": Method(packsaddle.TopK(1 / 32, values="int8"), 8, nesterov),
    "local 30, TopK 1/32 int8, Nesterov": Method(packsaddle.TopK(1 / 32, values="int8"), 30, nesterov),
}
WORKERS, BATCH = 4, 8
MODEL = ModelConfig("char-transformer", width=96, depth=3, heads=4)


def train(method: str, rate: float, seed: int, steps: int, deal: str) -> dict[str, object]:
    """Train one model on this worker's shard, "iid" or by "class" (a contiguous part of the text); return its row."""
    group, cpu, how = resolve(None), torch.device("cpu"), METHODS[method]
    data, held_out = texts()
    network = make_task(MODEL, data.shape, data.classes, seed=seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    exchange = Exchange(network, optimizer, how)
    mine = shard(data, deal, worker=group.rank, workers=group.size, seed=seed)
    batches, losses, start = Batches(mine, BATCH, worker=group.rank, seed=seed), [], time.perf_counter()
    for step in range(steps):
        optimizer.zero_grad()
        loss = exchange.model(*data.batch(batches[step], cpu))
        loss.backward()
        exchange.of_gradients()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    taken, sent = time.perf_counter() - start, exchange.sent(steps)
    exchange.end()
    with torch.no_grad():
        windows = torch.arange(group.rank, len(held_out), group.size).split(256)
        total = torch.tensor([sum(float(network(*held_out.batch(index, cpu))) * len(index) for index in windows)])
        last = torch.tensor([statistics.fmean(losses[-max(1, steps // 10) :]) / group.size])
        for value in (total, last):
            group.all_reduce(value)
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "validation_loss": round(float(total) / len(held_out), 4),
        "training_loss": round(float(last), 4),
        "sent_kB_a_step": round(sent / steps / 1e3, 2),
        "s": round(taken, 1),
    }


@cache
def texts() -> tuple[Any, Any]:
    """Return the training text and the held-out text."""
    return load_data(DataConfig("text"), None, train=True), load_data(DataConfig("text"), None, train=False)


class Exchange:
    """The exchange of a method on one worker, with its bytes."""

    def __init__(self, network: torch.nn.Module, optimizer: torch.optim.Optimizer, how: Method) -> None:
        self.model, self._network, self._local, self._hook = network, network, None, None
        self._is_dense = how.compressor is None
        if how.every is not None:
            self._local = packsaddle.LocalUpdates(
                optimizer,
                packsaddle.Compression(how.compressor or packsaddle.Identity(), decay=how.decay),
                every=how.every,
                outer=how.outer,
                overlap=packsaddle.Overlap(how.delay, how.fragments),
                keep_unsent=how.keep,
            )
        elif how.compressor is not None:
            self.model = DistributedDataParallel(network)
            self._hook = packsaddle.register_ddp_hook(self.model, how.compressor, optimizer=optimizer)

    def of_gradients(self) -> None:
        """Average gradients, if the method does so without a hook."""
        if self._is_dense:
            grads = [p.grad for p in self._network.parameters() if p.grad is not None]
            flat, group = torch.nn.utils.parameters_to_vector(grads), resolve(None)
            group.all_reduce(flat)
            torch.nn.utils.vector_to_parameters(flat / group.size, grads)

    def sent(self, steps: int) -> float:
        """Return the total bytes that this worker has sent; for averaged gradients those of a ring all-reduce."""
        if self._local is not None:
            return training_bytes(self._local.ledger)
        if self._hook is not None:
            return training_bytes(self._hook.ledger)
        payload = sum(p.numel() * p.element_size() for p in self._network.parameters())
        return steps * payload * 2 * (WORKERS - 1) / WORKERS

    def end(self) -> None:
        """Set all workers to one model: exchange pending updates uncompressed; these bytes are not counted."""
        if self._local is not None:
            self._local.flush(packsaddle.Identity())


def training_bytes(ledger: packsaddle.Ledger) -> int:
    """Return the bytes sent, without the start, which sends the initial parameters once."""
    return sum(moved.sent for purpose, moved in ledger.by_purpose.items() if purpose != "start")


def work(jobs: list[Job], out: str, steps: int, deal: str) -> None:
    """Make runs with a hook sequentially; rank 0 writes a row after each."""
    with process_group():
        for job in jobs:
            row = train(*job, steps, deal)
            if torch.distributed.get_rank() == 0:
                append(Path(out), row)


def make(jobs: list[Job], out: Path, steps: int, deal: str) -> None:
    """Make runs; those without a hook run in this process."""
    torch.set_num_threads(1)
    for job in jobs:
        if METHODS[job[0]].every is None and METHODS[job[0]].compressor is not None:
            launch(work, ([job], str(out), steps, deal), WORKERS)
        else:
            append(out, packsaddle.simulate(lambda _, job=job: train(*job, steps, deal), WORKERS)[0])


def main() -> None:
    assert __doc__
    search = RateSearch(
        __doc__,
        METHODS,
        (0.001, 0.002, 0.004),
        ("sent_kB_a_step", "sent, kB a step"),
        Path("experiments/local-updates/runs.csv"),
        steps=800,
        colours=(("local", "#d1495b"), ("DiLoCo", "#2e6f95"), ("hook", "#6a994e")),
    )
    search.main(
        lambda jobs, options: make(jobs, options.out, options.steps, options.shard),
        lambda parser: parser.add_argument(
            "--shard", choices=("iid", "class"), default="iid", help="class: a stretch of the text each"
        ),
    )


if __name__ == "__main__":
    main()
