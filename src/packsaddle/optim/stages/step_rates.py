"""Rates that each worker steps by on its own, a digest of all so far, and the difference where digests differ.

Learning rates, weight decays and the noise's r are never sent. Where every worker makes its own part of v = e + u of
them, x stays equal when they differ, and the algorithm is another one without a word: e is in units of the worker's own
rate, and the mean of unlike noises is not xi.
"""

import struct
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor


class StepRates:
    """The last step's r, then each parameter group's learning rate and weight decay; and 8 bytes that a difference in
    any step since the start has changed."""

    def __init__(self) -> None:
        self._digest = bytes(8)
        self.last: Sequence[float] = ()

    def add(self, rates: Sequence[float]) -> None:
        """Take note of a step's rates, as many on all workers."""
        packed = struct.pack(f"<{len(rates)}d", *rates)
        self._digest = blake2b(self._digest + packed, digest_size=8).digest()
        self.last = rates

    def clear(self) -> None:
        """Begin anew, where a saved state is loaded."""
        self._digest, self.last = bytes(8), ()

    def digest(self, device: torch.device) -> Tensor:
        """Return the 8 bytes, int64[]."""
        return torch.tensor(int.from_bytes(self._digest, "little", signed=True), device=device)


def first_difference(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Name what differs first in two steps' rates, with both values; "" if nothing does."""
    for i, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        if here != there:
            group, is_decay = divmod(i - 1, 2)
            name = f"{('lr', 'weight_decay')[is_decay]} of parameter group {group}" if i else "noise"
            return f"{name} is {here:.6g}, not {there:.6g}"
    return ""
