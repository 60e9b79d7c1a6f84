"""packsaddle beside what it replaces: 1-bit and 0/1 Adam, torchft's DiLoCo, and local SGD (torchft's and Accelerate's).

A character transformer of 69,509 parameters on the reference of the Python language, two gloo workers with 4 windows
each, 200 steps; warm-up and cosine decay. 1-bit Adam and 0/1 Adam are lab/bench/onebit_adam.py and zero_one_adam.py,
frozen after a quarter of the steps; then the interval of 0/1 Adam's exchanges doubles every quarter (1, 2, 4).
DiLoCo is torchft's own (without torchft its rows are left out). Local SGD averages float32 parameters, as both do.
The command line is that of lab/bench/rate_search.py:

    python -m lab.bench.migrations search    # every method and rate, seed 0
    python -m lab.bench.migrations seeds     # seeds 1 and 2 at each method's best rate
    python -m lab.bench.migrations table
"""

import importlib.util
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import packsaddle
from lab.bench.onebit_adam import OneBitAdam
from lab.bench.rate_search import Job, RateSearch, append, rate_at
from lab.bench.zero_one_adam import ZeroOneAdam
from lab.race import torchft_diloco
from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import Batches, load_data, make_task, shard
from packsaddle.comm import launch, process_group

WORKERS, BATCH = 2, 4
MODEL = ModelConfig("char-transformer", width=48, depth=2, heads=4)
RATES = (0.001, 0.002, 0.004, 0.008, 0.016)


class Method:
    """One way to train `task` with AdamW: `step` is an inner step with its exchange, `sent` this worker's bytes."""

    def __init__(self, task: nn.Module, rate: float) -> None:
        self.task = self.model = task
        self.inner: torch.optim.Optimizer = torch.optim.AdamW(task.parameters(), rate, (0.9, 0.99), weight_decay=0.1)
        self.payload = sum(4 * p.numel() for p in task.parameters())
        self.sent = 0.0

    def step(self) -> None:
        self.inner.step()

    def finish(self) -> None:
        """End the exchanges: afterwards the workers have one model, whose loss is measured."""


class Dense(Method):
    def __init__(self, task: nn.Module, rate: float) -> None:
        super().__init__(task, rate)
        self.model = nn.parallel.DistributedDataParallel(task)

    def step(self) -> None:
        self.inner.step()
        self.sent += self.payload  # 2 (W - 1) / W of it, with two workers


class Hook(Dense):
    def __init__(self, task: nn.Module, rate: float, compressor: packsaddle.compressors.Compressor) -> None:
        super().__init__(task, rate)
        self.hook = packsaddle.register_ddp_hook(self.model, compressor, optimizer=self.inner)

    def step(self) -> None:
        self.inner.step()
        self.sent = self.hook.ledger.total.sent


class DeepSpeed(Method):
    """1-bit Adam, or 0/1 Adam if `local_scaler` is given."""

    def __init__(self, task: nn.Module, rate: float, freeze: int, local_scaler: int | None = None) -> None:
        super().__init__(task, rate)
        options = {"betas": (0.9, 0.99), "weight_decay": 0.1}
        self.inner = (
            OneBitAdam(task.parameters(), rate, freeze, **options)
            if local_scaler is None
            else ZeroOneAdam(task.parameters(), rate, freeze, local_scaler, **options)
        )

    def step(self) -> None:
        self.inner.step()
        self.sent = self.inner.sent


class LocalSGD(Method):
    def __init__(self, task: nn.Module, rate: float, every: int) -> None:
        super().__init__(task, rate)
        self.every, self.steps = every, 0

    def step(self) -> None:
        self.inner.step()
        self.steps += 1
        if self.steps % self.every == 0:
            self.sent += self.payload
            self.finish()

    def finish(self) -> None:
        for p in self.task.parameters():
            dist.all_reduce(p.data)
            p.data /= WORKERS


class DiLoCo(Method):
    def __init__(self, task: nn.Module, rate: float, every: int) -> None:
        super().__init__(task, rate)
        self.every, self.steps = every, 0
        self.finish = torchft_diloco.attach(task, self.inner, every)  # type: ignore[method-assign]

    def step(self) -> None:
        self.inner.step()
        self.steps += 1
        self.sent = self.payload * (self.steps // self.every)


class Local(Method):
    def __init__(self, task: nn.Module, rate: float, every: int, outer: packsaddle.OuterSGD | None = None) -> None:
        super().__init__(task, rate)
        self.local = packsaddle.LocalUpdates(self.inner, every=every, outer=outer)

    def step(self) -> None:
        self.inner.step()
        self.sent = sum(moved.sent for purpose, moved in self.local.ledger.by_purpose.items() if purpose != "start")

    def finish(self) -> None:
        self.local.flush(packsaddle.Identity())


METHODS: dict[str, Callable[..., Method]] = {
    "DDP": Dense,
    "1-bit Adam": DeepSpeed,
    "0/1 Adam": DeepSpeed,
    "hook, QSGD(127)": partial(Hook, compressor=packsaddle.QSGD(127)),
    "hook, Sign()": partial(Hook, compressor=packsaddle.Sign()),
    "local updates, every 1": partial(Local, every=1),
    "local updates, every 8": partial(Local, every=8),
    "local updates, every 25, OuterSGD()": partial(Local, every=25, outer=packsaddle.OuterSGD()),
    "local SGD, every 8": partial(LocalSGD, every=8),
    "torchft's DiLoCo, every 25": partial(DiLoCo, every=25),
}


def train(method: str, rate: float, seed: int, steps: int) -> dict[str, object]:
    """Train one model on this worker's shard and return its row."""
    rank, cpu = dist.get_rank(), torch.device("cpu")
    data, held_out = (load_data(DataConfig("text"), None, train=part) for part in (True, False))
    batches = Batches(shard(data, "iid", worker=rank, workers=WORKERS, seed=seed), BATCH, worker=rank, seed=seed)
    task = make_task(MODEL, data.shape, data.classes, seed=seed)
    quarter = steps // 4
    options = {"1-bit Adam": {"freeze": quarter}, "0/1 Adam": {"freeze": quarter, "local_scaler": quarter}}
    how = METHODS[method](task, rate, **options.get(method, {}))
    schedule = torch.optim.lr_scheduler.LambdaLR(how.inner, lambda step: rate_at(step, steps))

    start = time.perf_counter()
    for step in range(steps):
        task.zero_grad()
        how.model(*data.batch(batches[step], cpu)).backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        how.step()
        schedule.step()
    taken, sent = time.perf_counter() - start, how.sent
    how.finish()

    with torch.no_grad():
        windows = torch.arange(rank, len(held_out), WORKERS).split(256)
        found = torch.tensor([sum(float(task(*held_out.batch(i, cpu))) * len(i) for i in windows)])
    dist.all_reduce(found)
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "steps": steps,
        "validation_loss": round(float(found) / len(held_out), 4),
        "kB_a_step": round(sent / steps / 1e3, 2),
        "s": round(taken, 1),
    }


def work(jobs: list[Job], out: str, steps: int) -> None:
    """Run the jobs sequentially; rank 0 writes a row after each."""
    torch.set_num_threads(1)
    with process_group():
        for job in jobs:
            row = train(*job, steps)
            if dist.get_rank() == 0:
                append(Path(out), row)


def main() -> None:
    assert __doc__
    methods = [name for name in METHODS if importlib.util.find_spec("torchft") or not name.startswith("torchft")]
    heading = ("kB_a_step", "kB a step")
    search = RateSearch(__doc__, methods, RATES, heading, Path("experiments/migrations/runs.csv"), steps=200)
    search.main(
        lambda jobs, options: launch(work, (jobs, str(options.out), options.steps), WORKERS), lambda parser: None
    )


if __name__ == "__main__":
    main()
