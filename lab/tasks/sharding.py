"""Shards and training batches of workers, batches of chosen examples, and the epochs and steps of a run.

Training batches are pure functions of (seed, worker, step), and of the changes in the number of workers of a run.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lab.tasks.images import Dataset
from packsaddle.errors import ConfigError
from packsaddle.numerics.seeds import Stream, generator

History = Sequence[tuple[int, int]]  # (first step, number of workers) of each part of a run


@dataclass(frozen=True)
class Calendar:
    """Conversion between steps and epochs, i.e. passes over the data by all workers together.

    The number of workers may change during a run.
    """

    per_epoch: int  # number of steps in an epoch, with the current number of workers
    start: int  # first step with the current number of workers
    done: float  # number of epochs done at `start`
    steps: int  # number of steps of the whole run

    @classmethod
    def of(cls, history: History, examples: int, batch_size: int, epochs: float) -> "Calendar":
        """Return the calendar of a run of `epochs`. It has at least one step after the last change of the workers."""
        done = 0.0
        for (start, workers), (stop, _) in pairwise(history):
            done += (stop - start) / _per_epoch(examples, batch_size, workers)
        start, workers = history[-1]
        per_epoch = _per_epoch(examples, batch_size, workers)
        return cls(per_epoch, start, done, start + max(1, round((epochs - done) * per_epoch)))

    def position(self, step: int) -> float:
        """Return the number of steps that the current number of workers would have needed to reach `step`."""
        return step - self.start + self.done * self.per_epoch

    def epoch(self, step: int) -> float:
        return self.position(step) / self.per_epoch

    def step_at(self, epoch: float) -> int:
        return self.start + max(0, round(epoch * self.per_epoch - self.done * self.per_epoch))


def _per_epoch(examples: int, batch_size: int, workers: int) -> int:
    return max(1, examples // (batch_size * workers))


def shard(data: Dataset, how: str, *, worker: int, workers: int, seed: int) -> Tensor:
    """Return the indices of a worker's examples, int64.

    With `how` = "iid" it is a random part, of equal size for all workers. With "class" it consists of whole classes of
    images, or is one consecutive part of a text. Raises ConfigError if a worker has no examples.
    """
    if how == "class":
        mine = (data.owners(workers) == worker).nonzero().squeeze(1)
    else:
        mine = torch.randperm(len(data), generator=generator(seed, 0, Stream.SHARD))[worker::workers]
    if len(mine) == 0:
        raise ConfigError(f"worker {worker} of {workers} gets no examples with data.shard = {how!r}; use fewer workers")
    return mine


class Batches:
    """A worker's training batches, by step: shuffled passes over its shard `indices`.

    The passes are numbered from `first`, since the number is part of the seed. At step `start` the batches begin with
    the examples `rest`, int64[m], which are left from an unfinished pass with another number of workers.
    """

    def __init__(
        self,
        indices: Tensor,
        batch_size: int,
        *,
        worker: int,
        seed: int,
        start: int = 0,
        rest: Tensor | None = None,
        first: int = 0,
    ) -> None:
        self._indices, self._batch_size, self._worker, self._seed = indices, batch_size, worker, seed
        self._start, self._first = start, first
        self._rest = indices[:0] if rest is None else rest
        self._number, self._order = -1, indices  # number and order of the last pass

    def __getitem__(self, step: int) -> Tensor:
        """Return the indices of the batch of a step, int64[batch_size]. A batch may extend into the next pass."""
        picked = []
        position, missing = (step - self._start) * self._batch_size, self._batch_size
        while missing:
            part = self._from(position)[0][:missing]
            picked.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(picked)

    def left(self, step: int) -> tuple[Tensor, int]:
        """Return the examples that remain in the current pass at a step, int64[m], and the number of the next pass."""
        left, number = self._from((step - self._start) * self._batch_size)
        if number >= self._first and len(left) == len(self._indices):
            return left[:0], number
        return left, number + 1

    def _from(self, position: int) -> tuple[Tensor, int]:
        """Return the examples that remain in the current pass after `position` examples, and the number of the pass."""
        if position < len(self._rest):
            return self._rest[position:], self._first - 1
        passes, offset = divmod(position - len(self._rest), len(self._indices))
        number = self._first + passes
        if number != self._number:
            rng = generator(self._seed, number, Stream.BATCH, worker=self._worker)
            self._number, self._order = number, self._indices[torch.randperm(len(self._indices), generator=rng)]
        return self._order[offset:], number


def deal(
    data: Dataset, how: str, batch_size: int, *, seed: int, history: History, workers: Iterable[int]
) -> list[Batches]:
    """Return the batches of each of the given `workers`, in a run with a `history` of numbers of workers.

    When the number of workers has changed, an example that remains in an unfinished pass goes to the worker whose shard
    now contains it, so that no example is repeated or dropped. Raises ConfigError if a worker has no examples.
    """
    rest, first = torch.empty(0, dtype=torch.int64), 0

    def begin(start: int, size: int, worker: int) -> Batches:
        mine = shard(data, how, worker=worker, workers=size, seed=seed)
        own = mine[torch.isin(mine, rest)]
        rng = generator(seed, start, Stream.SHARD, worker=worker)
        own = own[torch.randperm(len(own), generator=rng)]
        return Batches(mine, batch_size, worker=worker, seed=seed, start=start, rest=own, first=first)

    # For each part of the run with one number of workers, in order, compute the examples left at its end.
    for (start, size), (stop, _) in pairwise(history):
        left = [begin(start, size, w).left(stop) for w in range(size)]
        rest, first = torch.cat([part for part, _ in left]), max(number for _, number in left)
    return [begin(*history[-1], w) for w in workers]


@dataclass(frozen=True)
class Examples:
    """Chosen examples as an iterable of batches, on a device and in a dtype; may be iterated repeatedly."""

    data: Dataset
    index: Tensor  # indices of the examples, int64[n]
    device: torch.device
    dtype: torch.dtype = torch.float32
    batch_size: int = 500

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for part in torch.split(self.index, self.batch_size):
            if len(part):
                yield self.data.batch(part, self.device, self.dtype)
