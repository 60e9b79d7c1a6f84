"""The training loop of a configured run: the same for one process, torchrun's workers and a simulation."""

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.config import Config, NoiseConfig
from packsaddle.data import Batches, load_data, shard
from packsaddle.escape import Escape
from packsaddle.exchange import local_device, resolve
from packsaddle.inspection import Inspector
from packsaddle.ledger import Bytes
from packsaddle.models import Task, make_task
from packsaddle.noise import Ramp
from packsaddle.norms import average_buffers, connect
from packsaddle.optimizer import CompressedSGD
from packsaddle.progress import live, megabytes
from packsaddle.runfolder import RunFolder
from packsaddle.schema import ConfigError
from packsaddle.seeds import Stream, mix
from packsaddle.simulate import FusedGroup

_EVAL_BATCH = 512
_NOT_TRAINING = ("start", "metrics", "buffers")  # what bytes are for besides gradients


class Training:
    """One worker's side of a run. Construction loads data and model; `run` trains and writes the run folder."""

    def __init__(self, config: Config, data_dir: Path | None, download: bool) -> None:
        self.config = config
        self.group = resolve(None)
        self.device = local_device()
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.data = load_data(config.data, data_dir, train=True, download=download)
        self.test_data = load_data(config.data, data_dir, train=False, download=download)
        rank, size = self.group.rank, self.group.size
        # The workers this process stands for: all of them in a fused simulation, else one.
        self.members = range(size) if isinstance(self.group, FusedGroup) else range(rank, rank + 1)
        self.shards = [
            shard(self.data, config.data.shard, worker=w, workers=size, seed=config.seed) for w in self.members
        ]
        self.batches = [
            Batches(mine, config.batch_size, worker=w, seed=config.seed)
            for w, mine in zip(self.members, self.shards, strict=True)
        ]
        self.steps_per_epoch = max(1, len(self.data) // (config.batch_size * size))
        rounds = round(config.epochs * self.steps_per_epoch / config.local_steps)
        self.steps = max(1, rounds) * config.local_steps  # a run ends with an exchange
        start = mix(config.seed, int(Stream.INIT)) >> 33
        shape, parts = self.data.shape, len(self.members)
        task = make_task(config.model, shape, self.data.classes, start, parts).to(self.device, self.dtype)
        # Convolutions on a CPU are a quarter faster with channels last.
        self.task: Task = task.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = self._make_optimizer()
        connect(self.task, self.optimizer.channel)
        self.inspector = Inspector(config, self.task, self.data, self.shards, self.steps, self.steps_per_epoch)

    def _make_optimizer(self) -> CompressedSGD:
        config = self.config
        try:
            return CompressedSGD(
                self.task.named_parameters(),
                config.lr,
                compressor=config.compressor,
                noise=_noise(config.noise, self.steps_per_epoch, self.steps),
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
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error

    def run(self, folder: RunFolder, *, quiet: bool) -> None:
        """Train, recording a line of metrics every `log_every` steps, then evaluate, summarise and checkpoint."""
        sums = torch.zeros(2, dtype=torch.float64)  # of the loss and of the gradient norm since the last line
        final = torch.zeros(1, dtype=torch.float64)  # mean loss of the last epoch
        line: dict[str, Any] = {}  # the last one written; the last step always writes one
        begin, since, text = time.perf_counter(), 0, "starting"
        tested = 0.0  # seconds spent on tests along the run
        with live(self.config.label or folder.path.name, self.steps, quiet=quiet or self.group.rank != 0) as report:
            for step in range(self.steps):
                self.inspector.look(step, folder)
                measured = self._step(step)
                sums += measured
                if step >= self.steps - self.steps_per_epoch:
                    final += measured[0] / min(self.steps, self.steps_per_epoch)
                if (step + 1) % self.config.log_every == 0 or step + 1 == self.steps:
                    means = self.optimizer.channel.mean(sums / (step + 1 - since), "metrics")
                    line = self._line(step + 1, means, time.perf_counter() - begin - self.inspector.seconds - tested)
                    if self._test_due(step + 1, since):
                        before = time.perf_counter()
                        line |= self._test()
                        tested += time.perf_counter() - before
                    if self.group.rank == 0:
                        folder.append("metrics.jsonl", line)
                    sums, since, text = torch.zeros_like(sums), step + 1, _describe(line, self.group.size)
                report(step + 1, text)
            self.inspector.look(self.steps, folder)
        self._finish(folder, line, self.optimizer.channel.mean(final, "metrics").item())

    def _step(self, step: int) -> Tensor:
        """One step of the algorithm; returns this worker's loss and gradient norm, float64[2]."""
        index = torch.cat([batches[step] for batches in self.batches])

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self._loss(index)
            torch.autograd.backward(loss)
            return loss.detach()

        loss = self.optimizer.step(closure)
        gradients = [p.grad for p in self.task.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        return torch.stack([loss, norm]).to("cpu", torch.float64)

    def _test_due(self, steps: int, since: int) -> bool:
        """Whether a test fell due since the last line of metrics."""
        if self.config.test_every is None:
            return False
        every = self.config.test_every * self.steps_per_epoch
        return steps // every > since // every

    def _batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.batch(index, self.device, self.dtype)

    def _loss(self, index: Tensor) -> Tensor:
        """The mean loss of the chosen examples."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            loss: Tensor = self.task(*self._batch(index))
        return loss

    def _line(self, steps: int, means: Tensor, seconds: float) -> dict[str, Any]:
        purposes = self.optimizer.ledger.by_purpose  # the start is sent once, however long the run
        moved = sum((b for name, b in purposes.items() if name != "start"), Bytes())
        return {
            "step": steps,
            "epoch": steps / self.steps_per_epoch,
            "loss": float(means[0]),
            "grad_norm": float(means[1]),
            **asdict(moved),
            "seconds": seconds,
            "resets": len(self.optimizer.resets),
            "mu": self.optimizer.monitor.whole,
            "mu_by_tensor": self.optimizer.monitor.by_tensor,
        }

    def _finish(self, folder: RunFolder, last: dict[str, Any], final_loss: float) -> None:
        """Save the checkpoint before anything that could still fail, then evaluate and summarise."""
        average_buffers(self.task, self.optimizer.channel)
        folder.save_tensors(f"checkpoint/worker-{self.group.rank}.pt", self.optimizer.state_dict())
        if self.group.rank == 0:
            weights = {k: v.clone() for k, v in self.task.network.state_dict().items()}
            folder.save_tensors("checkpoint/model.pt", weights)
        test = self._test()
        if self.group.rank != 0:
            return
        opt, ledger = self.optimizer, self.optimizer.ledger
        dense = self.steps * opt.numel * 4
        training = sum(
            b.payload for name, b in ledger.by_purpose.items() if name not in ("start", "metrics", "buffers")
        )
        folder.write_json(
            "summary.json",
            {
                "label": self.config.label or folder.path.name,
                "workers": self.group.size,
                "steps": self.steps,
                "final_loss": final_loss,
                **test,
                "parameters": opt.numel,
                "compressed_parameters": opt.compressed_numel,
                "mu": opt.mu,
                "exchange": opt.choice.name,
                "exchange_reason": opt.choice.reason,
                **asdict(ledger.total),
                "bytes_by_purpose": {name: asdict(b) for name, b in ledger.by_purpose.items()},
                "compression": dense / training if training else math.inf,
                "seconds": last["seconds"],
                "resets": [asdict(r) for r in opt.resets],
            },
        )

    @torch.no_grad()
    def _test(self) -> dict[str, float]:
        """Mean test loss, and accuracy of a classifier; each worker takes its share of the test images."""
        average_buffers(self.task, self.optimizer.channel)
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, examples
        self.task.eval()
        mine = torch.cat([torch.arange(len(self.test_data))[w :: self.group.size] for w in self.members])
        for index in torch.split(mine, _EVAL_BATCH):
            batch = self.test_data.batch(index, self.device, self.dtype)
            correct = float(self.task.correct(*batch)) if self.task.classifies else 0.0
            totals += torch.tensor([float(self.task(*batch)) * len(index), correct, len(index)], dtype=torch.float64)
        self.task.train()
        loss, correct, examples = self.optimizer.channel.mean(totals, "metrics").tolist()
        return {"test_loss": loss / examples, **({"test_accuracy": correct / examples} if self.task.classifies else {})}

    def _escape(self) -> Escape | None:
        rule = self.config.escape
        if rule is None:
            return None
        sample = torch.cat([mine[: rule.examples] for mine in self.shards])

        def objective() -> Tensor:
            self.task.eval()
            losses = [self._loss(i) * len(i) for i in torch.split(sample, _EVAL_BATCH)]
            self.task.train()
            return torch.stack(losses).sum() / len(sample)

        return Escape(rule.interval, rule.radius, objective, compare=rule.compare, every=rule.every)


def _noise(config: NoiseConfig, steps_per_epoch: int, steps: int) -> float | Ramp:
    """Translate a noise schedule from epochs to steps."""
    if config.lower_from is None:
        return config.std
    stop = steps if config.lower_until is None else round(config.lower_until * steps_per_epoch)
    start = min(round(config.lower_from * steps_per_epoch), stop)
    return Ramp(config.std, start, stop)


def _describe(line: dict[str, Any], workers: int) -> str:
    moved = line["sent"] if workers > 1 else line["payload"]
    return f"loss {line['loss']:.4f}  gradient {line['grad_norm']:.1e}  {megabytes(moved)}"
