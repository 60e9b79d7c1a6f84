"""The greeting of workers that come and go, at the start of a round."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Hello:
    """A worker's account of itself at the start of a round; whole numbers below 2^63, and reals."""

    worker: int  # its name
    arguments: int  # a hash of what all must have been given
    history: int  # a hash of the rounds that made its anchor
    anchor: int  # its fingerprint, where that is compared in this round
    run: int
    attempt: int
    steps: int  # inner steps since the last round that has its update
    dense: int  # 1: asks for a round in which all that is pending is sent
    keeps: int  # 1: has a file for its memory
    weight: float
    idle_weight: float  # in a dense round, if it has not moved
    seconds: float  # of an inner step; 0: unknown
    lost: float  # a norm, of what it has found to be lost

    def packed(self, device: torch.device) -> Tensor:
        """Return it as int64[13]."""
        *whole, a, b, c, d = astuple(self)
        reals = torch.tensor([a, b, c, d], dtype=torch.float64).view(torch.int64)
        return torch.cat([torch.tensor(whole, dtype=torch.int64), reals]).to(device)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Hello":
        """Return what int64[13] says."""
        here = packed.cpu()
        whole = len(fields(cls)) - 4
        return cls(*here[:whole].tolist(), *here[whole:].clone().view(torch.float64).tolist())


def most(values: Sequence[Any]) -> Any:
    """Return the value that most have; of several, the one that comes first."""
    return Counter(values).most_common(1)[0][0]
