"""A run's look at its effective step, before it and after 1, 2, 4, ... epochs (see `packsaddle.stability`)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packsaddle.calendar import Calendar
from packsaddle.channel import Channel
from packsaddle.config import Config
from packsaddle.curvature import Curvature, NotFiniteError
from packsaddle.dataset import Dataset
from packsaddle.exchange import Solo
from packsaddle.inspection import Examples, task_loss
from packsaddle.ledger import Ledger
from packsaddle.models import Task
from packsaddle.optimizer import CompressedSGD
from packsaddle.seeds import Stream, generator
from packsaddle.stability import Step, largest_overshoot

_EXAMPLES = 256
_LONG = 5.0  # steps in the mean; who waits for less moves by few gradients at once


class Footing:
    """Looks where a coordinate waits long to be sent, at the examples of this process alone.

    The mean over workers would cost several dense exchanges.
    """

    def __init__(
        self, config: Config, task: Task, optimizer: CompressedSGD, data: Dataset, shards: Sequence[Tensor]
    ) -> None:
        """`shards` has the shard of each worker that this process stands for."""
        self._config, self._task = config, task
        waits = optimizer.waits() or []
        self._steps = [
            Step(name, config.lr / (1 - config.momentum), wait)
            for (name, p), wait in zip(task.named_parameters(), waits, strict=False)
            if p.requires_grad
        ]
        self._concerned = any(step.wait >= _LONG for step in self._steps)
        first = next(task.parameters())
        chosen = torch.cat([_spread(shard, max(1, _EXAMPLES // len(shards))) for shard in shards])
        self._examples = Examples(data, chosen, first.device, first.dtype)

    def due(self, step: int, calendar: Calendar) -> bool:
        """Whether to look before step `step`."""
        epochs, rest = divmod(step, calendar.per_epoch)
        return self._concerned and rest == 0 and epochs & (epochs - 1) == 0

    def warning(self, step: int) -> str | None:
        """Return what is to be said, if the step is past stability."""
        channel = Channel(Solo(), Ledger())
        dice = generator(self._config.seed, step, Stream.CERTIFY)
        try:
            worst = largest_overshoot(Curvature(self._task, task_loss, self._examples, channel), self._steps, dice)
        except NotFiniteError:
            return None  # the gradient tells
        return worst.advice() if worst.is_unstable else None


def _spread(shard: Tensor, n: int) -> Tensor:
    """Some indices from all over a shard, which may be sorted by class."""
    return shard[:: max(1, len(shard) // n)][:n]
