"""What a configured run consists of on one worker: data, model, optimizer, and the plan of its steps."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.agree import check_agreement
from packsaddle.calendar import Calendar
from packsaddle.channel import Channel
from packsaddle.config import Config, NoiseConfig
from packsaddle.data import deal, load_data, shard
from packsaddle.escape import Escape
from packsaddle.exchange import Group, Solo, local_device, resolve
from packsaddle.footing import Footing
from packsaddle.inspection import Inspector
from packsaddle.ledger import Ledger
from packsaddle.models import Task, make_task
from packsaddle.noise import Ramp, Rescheduled
from packsaddle.noisecheck import NoiseCheck
from packsaddle.norms import connect
from packsaddle.optimizer import CompressedSGD
from packsaddle.schema import ConfigError
from packsaddle.seeds import Stream, mix
from packsaddle.simulate import FusedGroup
from packsaddle.tally import Tally

EVAL_BATCH = 512  # examples at once where no gradients are needed


class Prepared:
    """One worker's side of a run before it begins; collective."""

    def __init__(self, config: Config, data_dir: Path | None, download: bool) -> None:
        self.config = config
        self.group = resolve(None)
        self.device = local_device()
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.data = load_data(config.data, data_dir, train=True, download=download)
        self.test_data = load_data(config.data, data_dir, train=False, download=download)
        self._check_data()
        rank, size = self.group.rank, self.group.size
        # The workers this process stands for: all of them in a fused simulation, else one.
        self.members = range(size) if isinstance(self.group, FusedGroup) else range(rank, rank + 1)
        self.history = [(0, size)]
        self._plan()
        start = mix(config.seed, int(Stream.INIT)) >> 33
        shape, parts = self.data.shape, len(self.members)
        task = make_task(config.model, shape, self.data.classes, start, parts).to(self.device, self.dtype)
        # Convolutions on a CPU are a quarter faster with channels last.
        self.task: Task = task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._schedule = Rescheduled(self._ramp) if self._ramp else None
        self.optimizer = self._make_optimizer()
        connect(self.task, self.optimizer.channel)
        calendar = self.calendar
        self.inspector = Inspector(config, self.task, self.data, self.shards, calendar.steps, calendar.per_epoch)
        self.footing = Footing(config, self.task, self.optimizer, self.data, self.shards)
        self.noise_check = NoiseCheck(config, self.task, self.data, size)
        self.warnings: list[str] = []
        self.tally = Tally()

    def _check_data(self) -> None:
        """Raise ConfigError if workers have read unlike data."""
        found = {"training examples": len(self.data), "test examples": len(self.test_data)}
        try:
            check_agreement(Channel(self.group, Ledger()), found, self.device)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def _plan(self) -> None:
        """Deal the data and lay out the run, as the history of the numbers of workers has it."""
        config, (_, size) = self.config, self.history[-1]
        how, seed = config.data.shard, config.seed
        self.shards = [shard(self.data, how, worker=w, workers=size, seed=seed) for w in self.members]
        self.batches = deal(self.data, how, config.batch_size, seed=seed, history=self.history, workers=self.members)
        self.calendar = Calendar.of(self.history, len(self.data), config.batch_size, config.epochs, config.local_steps)
        self._ramp = _ramp(config.noise, self.calendar)

    def _make_optimizer(self) -> CompressedSGD:
        config = self.config
        try:
            return CompressedSGD(
                self.task.named_parameters(),
                config.lr,
                compressor=config.compressor,
                noise=self._schedule or config.noise.std,
                escape=self._escape(),
                weight_decay=config.weight_decay,
                momentum=config.momentum,
                nesterov=config.nesterov,
                memory=config.memory,
                storm=config.storm,
                local_steps=config.local_steps,
                seed=config.seed,
                dense_below=config.dense_below,
                exchange=config.exchange,
                back=config.back,
                monitor_every=config.log_every,
                max_skipped=config.max_skipped,
                compare_every=config.compare_every,
                on_drift=config.on_drift,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def _noisy_steps(self) -> float:
        """The sum of (r_t / r)^2 over the run: its steps, less where r falls."""
        std = self.config.noise.std
        return self._ramp.squares(self.calendar.steps) / std**2 if self._ramp and std else float(self.calendar.steps)

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.batch(index, self.device, self.dtype)

    def _loss(self, index: Tensor) -> Tensor:
        """The mean loss of the chosen examples."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss: Tensor = self.task(*self._batch(index))
        return loss

    def _parts(self) -> dict[str, Any]:
        return {"model": self.task, "optimizer": self.optimizer}

    def _own_group(self) -> Group:
        """The group of those that have files: a fused simulation is one."""
        return Solo() if isinstance(self.group, FusedGroup) else self.group

    def _escape(self) -> Escape | None:
        rule = self.config.escape
        if rule is None:
            return None

        def objective() -> Tensor:
            sample = torch.cat([mine[: rule.examples] for mine in self.shards])
            self.task.eval()
            losses = [self._loss(i) * len(i) for i in torch.split(sample, EVAL_BATCH)]
            self.task.train()
            return torch.stack(losses).sum() / len(sample)

        return Escape(rule.interval, rule.radius, objective, compare=rule.compare, every=rule.every)


def _ramp(config: NoiseConfig, calendar: Calendar) -> Ramp | None:
    """Translate a noise schedule from epochs to steps, if there is one."""
    if config.lower_from is None:
        return None
    stop = calendar.steps if config.lower_until is None else calendar.step_at(config.lower_until)
    start = min(calendar.step_at(config.lower_from), stop)
    return Ramp(config.std, start, stop)
