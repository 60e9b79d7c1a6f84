"""What training and certificates ask of examples, be they images or text."""

from typing import Protocol

import torch
from torch import Tensor


class Dataset(Protocol):
    """n examples in memory, each an input with its target."""

    @property
    def shape(self) -> torch.Size:
        """One input's shape."""

    @property
    def classes(self) -> int:
        """How many values a target can have."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the inputs and targets of the examples index, int64[b], on a device; real numbers as `dtype`."""

    def owners(self, workers: int) -> Tensor:
        """Return which worker each example goes to, int64[n], where workers are to see different kinds."""
