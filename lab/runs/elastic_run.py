"""One worker of a configured run whose workers may join and leave: `python -m lab run --elastic`.

Every worker is started separately and writes its own folder. The number of steps, the epochs and the learning rate
schedule count the steps of all workers together. Data are not sharded, since the number of workers is unknown: each
worker uses all data, in its own random order.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.runs.config import Config
from lab.runs.progress import live
from lab.runs.run_checkpoints import NEVER, CheckpointPolicy
from lab.runs.run_folder import RunFolder
from lab.runs.trainer import RunCounters, Trainer
from lab.runs.training import LocalTraining
from packsaddle.comm.group import Solo, ambient_group
from packsaddle.errors import ConfigError
from packsaddle.local.options import Elastic


def check_elastic(config: Config) -> Config:
    """Return the configuration of one worker of an elastic run. Raises ConfigError for unsupported options."""
    if config.local is None:
        raise ConfigError(
            "--elastic needs [local] in the file: python -m lab init --task char-transformer-local has it"
        )
    for name, found in (
        ("local.overlap.delay", config.local.overlap.delay),
        ("escape", config.escape),
        ("certify", config.certify),
    ):
        if found:
            raise ConfigError(f"{name} cannot be used with --elastic, where workers may be missing")
    if config.data.shard != "iid":
        raise ConfigError("data.shard must be iid with --elastic, where each worker draws from all the data")
    return replace(config, workers=1)


class ElasticTrainer(Trainer):
    """The trainer of a worker under a torchft Manager. Only exchanges of local updates are collective."""

    training: LocalTraining

    def __init__(self, config: Config, data_dir: Path | None, download: bool, elastic: Elastic) -> None:
        # _seen: number of steps of all workers together at the last line of metrics.
        self._elastic, self._seen = elastic, 0
        with ambient_group(Solo()):
            super().__init__(check_elastic(config), data_dir, download)

    def _training(self) -> LocalTraining:
        return LocalTraining(self.config, self.task, self.calendar, None, self._elastic)

    def _indices(self) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(int.from_bytes(os.urandom(7), "little"))
        size = min(self.config.batch_size, len(self.data))
        while True:
            order = torch.randperm(len(self.data), generator=rng)
            yield from (index for index in torch.split(order, size) if len(index) == size)

    def run(self, folder: RunFolder, *, quiet: bool, saving: CheckpointPolicy = NEVER, count: str = "") -> bool:
        """Train until all workers together have done the run's steps; write this worker's metrics and results."""
        tally, training, steps, begin = self.tally, self.training, self.calendar.steps, time.perf_counter()
        if not quiet:
            print("waiting for the other workers' next round", flush=True)
        training.front.join()

        # Train until all workers together have done `steps` steps. A worker that joins late does fewer steps itself.
        with live(f"{count}{self.config.label or folder.path.name}", steps, quiet=quiet) as report:
            for index in self._indices():
                if training.front.position >= steps:
                    break
                measured = self._step_on(index, None)
                tally.add(measured, taken=training.took, last=False)
                tally.step += 1
                if tally.step % self.config.log_every == 0:
                    tally.line = self._log(folder, time.perf_counter() - begin)
                loss = f"loss {tally.line['loss']:.4f}  " if tally.line else ""
                report(min(steps, training.front.position), f"{loss}{training.front.workers} workers")

        # Do the last exchange, then write this worker's results.
        training.finish()
        if tally.step > tally.since or not tally.line:  # the latest steps have no line of metrics yet
            tally.line = self._log(folder, time.perf_counter() - begin)
        self._finish(folder, tally)
        self._elastic.manager.shutdown(wait=False)
        return True

    def _line(self, steps: int, means: Tensor, seconds: float) -> dict[str, Any]:
        """Return a line of metrics, as `Trainer` does, in which `step` counts the steps of all workers together."""
        return super()._line(min(self.calendar.steps, self.training.front.position), means, seconds)

    def _test_due(self, steps: int, since: int) -> bool:
        seen, self._seen = self._seen, self.training.front.position
        return super()._test_due(self._seen, seen)

    def _final_loss(self, tally: RunCounters) -> float:
        return float(tally.line["loss"])
