"""Certificates of training runs: along the run, and of what it left in its folder."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packsaddle.certificate import Verdict
from packsaddle.certify import certify
from packsaddle.config import CertifyConfig, Config
from packsaddle.curvature import NotFiniteError
from packsaddle.dataset import Dataset
from packsaddle.exchange import Solo, resolve
from packsaddle.iterates import draw_iterates
from packsaddle.models import Task
from packsaddle.runfolder import RunFolder
from packsaddle.seeds import Stream, generator
from packsaddle.simulate import FusedGroup

_BATCH = 500


@dataclass(frozen=True)
class Examples:
    """Chosen examples as batches that can be read again, on a device and in a precision."""

    data: Dataset
    index: Tensor  # int64
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_size: int = _BATCH

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(self.index, self.batch_size):
            if len(part):
                yield self.data.batch(part, self.device, self.dtype)


def task_loss(task: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The mean loss of a batch, for `certify`."""
    loss: Tensor = task(*batch)
    return loss


class Inspector:
    """One worker's part in the certificates of a run in progress; every method is collective."""

    def __init__(
        self, config: Config, task: Task, data: Dataset, shards: Sequence[Tensor], steps: int, per_epoch: int
    ) -> None:
        """`shards` has the shard of each worker that this process stands for (see `FusedGroup`)."""
        self._rule: CertifyConfig | None = config.certify
        self._lr = config.lr / (1 - config.momentum)
        self._task, self._seed, self._steps, self._per_epoch = task, config.seed, steps, per_epoch
        self._device = next(task.parameters()).device
        self.seconds = 0.0  # spent here
        self.examples = Examples(data, torch.cat(list(shards)), self._device)
        if self._rule is None:
            return
        # At random, since a shard may be sorted by class.
        chosen = [
            mine[self._order(len(mine), worker)[: self._rule.examples]]
            for worker, mine in enumerate(shards, start=resolve(None).rank)
        ]
        self.examples = Examples(data, torch.cat(chosen), self._device)
        self._population = len(data)
        self._due = certified_steps(self._rule, steps, per_epoch)
        self._iterates = set(draw_iterates(self._rule.iterates, steps, self._seed))

    def _order(self, n: int, worker: int) -> Tensor:
        return torch.randperm(n, generator=generator(self._seed, 0, Stream.CERTIFY, worker=worker))

    def look(self, step: int, folder: RunFolder) -> None:
        """Keep x_t if it was drawn, and certify it if it is due; t = `step`, before its gradient."""
        if self._rule is None:
            return
        begin = time.perf_counter()
        if step in self._iterates and resolve(None).rank == 0:
            folder.save_tensors(iterate_name(step), self._task.network.state_dict())
        if step in self._due:
            line = {"step": step, "epoch": step / self._per_epoch, **self._certify(self._rule, step)}
            if resolve(None).rank == 0:
                folder.append("certificates.jsonl", line)
        self.seconds += time.perf_counter() - begin

    def _certify(self, rule: CertifyConfig, step: int) -> dict[str, Any]:
        try:
            certificate = certify(
                self._task,
                task_loss,
                self.examples,
                epsilon=rule.last_epsilon if rule.last_epsilon and step == self._steps else rule.epsilon,
                hessian_lipschitz=rule.hessian_lipschitz,
                failure_probability=rule.failure_probability,
                max_hvps=rule.max_hvps,
                sample_of=self._population,
                lr=self._lr,
                generator=generator(self._seed, step, Stream.CERTIFY, device=self._device),
                process_group=Solo() if isinstance(resolve(None), FusedGroup) else None,
            )
        except NotFiniteError:  # a run that diverged goes on to its end and tells
            return {"verdict": str(Verdict.GRADIENT_TOO_LARGE), "loss": None}
        return certificate.to_dict()


def certified_steps(rule: CertifyConfig, steps: int, per_epoch: int) -> set[int]:
    """The steps of a run's certificates: every so many epochs, at chosen epochs within the run, and then at its end."""
    due = {round(epoch * per_epoch) for epoch in rule.at}
    if rule.every is not None:
        stride = max(1, round(rule.every * per_epoch))
        due |= set(range(stride, steps, stride))
    return {min(max(1, step), steps) for step in due} | ({steps} if due or rule.every is not None else set())


def iterate_name(step: int) -> str:
    """Where a run keeps the drawn iterate x_t."""
    return f"iterates/step-{step:08d}.pt"


def drawn_names(config: Config, steps: int) -> list[str]:
    """The files of the iterates that a run of T = `steps` draws, as often as they are drawn."""
    m = 0 if config.certify is None else config.certify.iterates
    return [iterate_name(step) for step in draw_iterates(m, steps, config.seed)]
