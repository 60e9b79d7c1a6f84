"""Epochs and steps of a run whose number of workers may change on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

History = Sequence[tuple[int, int]]  # since which step how many workers there are


@dataclass(frozen=True)
class Calendar:
    """Steps of the present number of workers: an epoch is a pass of all workers together over the data."""

    per_epoch: int  # steps in an epoch
    start: int  # since when there are so many workers
    done: float  # epochs by then
    steps: int  # of the whole run

    @classmethod
    def of(cls, history: History, examples: int, batch_size: int, epochs: float, local_steps: int) -> "Calendar":
        """Return it. A run ends with an exchange, and not before something is done."""
        done = 0.0
        for (start, workers), (stop, _) in pairwise(history):
            done += (stop - start) / _per_epoch(examples, batch_size, workers)
        start, workers = history[-1]
        per_epoch = _per_epoch(examples, batch_size, workers)
        rounds = round((epochs - done) * per_epoch / local_steps)
        return cls(per_epoch, start, done, start + max(1, rounds) * local_steps)

    def position(self, step: int) -> float:
        """The step that it would be if there had always been so many workers."""
        return step - self.start + self.done * self.per_epoch

    def epoch(self, step: int) -> float:
        """How many epochs are done at a step."""
        return self.position(step) / self.per_epoch

    def step_at(self, epoch: float) -> int:
        """The step at which so many epochs are done, or when there came to be so many workers, if that was later."""
        return self.start + max(0, round(epoch * self.per_epoch - self.done * self.per_epoch))


def _per_epoch(examples: int, batch_size: int, workers: int) -> int:
    return max(1, examples // (batch_size * workers))
