"""When a run saves a checkpoint, and when it stops because it was told to: agreed on in the exchange there is."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.stopping import asked_to_stop

_SECONDS = 30.0  # between checkpoints at least, where no number of steps is given
_STOP = 1024.0  # more than all workers' other wishes together, and exact in single precision
_COSTS = 50  # times as long as saving the last one took, too: so saving takes at most 2% of a run


@dataclass(frozen=True)
class Saving:
    """How often: every so many steps; None: about once an epoch, but at most every half minute; 0: never.

    Where a run does not `stop` on SIGTERM nothing need be agreed on, and None is every epoch.
    """

    every: int | None = None
    resume: bool = False  # go on from what the folder has
    stops: bool = True
    hint: str = ""  # the command that goes on with a run that was stopped

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise ValueError(f"checkpoint-every must be 0 or more steps, got {self.every}")

    @property
    def on(self) -> bool:
        """Whether there are checkpoints."""
        return self.every != 0


class Wishes:
    """What this worker wishes after a step, and what all of them then do: whether to save, and whether to stop.

    The wishes of all are averaged with the step's gradients, so that they hear of them at the same step; the clock that
    counts is worker 0's.
    """

    def __init__(self, saving: Saving, per_epoch: int, rank: int, workers: int, step: int) -> None:
        self._saving, self._per_epoch, self._rank, self._workers = saving, per_epoch, rank, workers
        self._saved, self._since, self._cost = step, time.monotonic(), 0.0

    def scalars(self, step: int) -> Tensor | None:
        """What this worker has to say in step `step`, float[1], or None if nobody ever has."""
        if not (self._saving.on and self._saving.stops):
            return None
        due = self._rank == 0 and self._by_the_clock(step + 1)
        return torch.tensor([_STOP * asked_to_stop() + due])

    def _by_the_clock(self, steps: int) -> bool:
        if self._saving.every is not None or steps - self._saved < self._per_epoch:
            return False
        return time.monotonic() - self._since >= max(_SECONDS, _COSTS * self._cost)

    def heard(self, steps: int, means: Tensor) -> tuple[bool, bool]:
        """Return whether to save and whether to stop when so many steps are done, from the means of the scalars."""
        if not self._saving.on:
            return False, False
        total = round(float(means[0]) * self._workers) if self._saving.stops else 0
        stop, due = total >= _STOP, total % _STOP > 0
        every = self._saving.every
        if every is None and not self._saving.stops:
            every = self._per_epoch
        if every is not None:
            due = steps // every > self._saved // every
        return due or stop, stop

    def saved(self, steps: int, seconds: float) -> None:
        """Know that a checkpoint was saved, and how long that took."""
        self._saved, self._since, self._cost = steps, time.monotonic(), seconds
