"""Shards and training batches of workers. Batches are pure functions of (seed, worker, step)."""

import torch
from torch import Tensor

from lab.tasks.images import Dataset
from packsaddle.errors import ConfigError
from packsaddle.numerics.seeds import Stream, generator


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
        raise ConfigError(
            f"worker {worker} of {workers} gets no examples with shards of kind {how!r}; use fewer workers"
        )
    return mine


class Batches:
    """A worker's training batches, by step: shuffled passes over its shard `indices`, int64[n]."""

    def __init__(self, indices: Tensor, batch_size: int, *, seed: int, worker: int = 0) -> None:
        self._indices, self._batch_size, self._worker, self._seed = indices, batch_size, worker, seed
        self._number, self._order = -1, indices  # number and order of the last pass

    def __getitem__(self, step: int) -> Tensor:
        """Return the indices of the batch of a step, int64[batch_size]. A batch may extend into the next pass."""
        picked = []
        position, missing = step * self._batch_size, self._batch_size
        while missing:
            number, offset = divmod(position, len(self._indices))
            if number != self._number:
                rng = generator(self._seed, number, Stream.BATCH, worker=self._worker)
                self._number, self._order = number, self._indices[torch.randperm(len(self._indices), generator=rng)]
            part = self._order[offset : offset + missing]
            picked.append(part)
            position, missing = position + len(part), missing - len(part)
        return torch.cat(picked)
