"""A compressor's budget over the slices of a gradient: as many coordinates for each as its magnitudes deserve.

The k largest of each of DistributedDataParallel's buckets are not the k largest of the model: a bucket whose gradients
are large gets no more than its size's share, and its error memory grows. The k largest of the model are known only when
all buckets have come, and by then the backward pass is over. So each slice gets the count that it had among the
model's k largest a step ago: k is met at every step, a bucket leaves as soon as it is there, and what a slice gets
too little of at one step is in its error memory, and so in its count, at the next.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packsaddle.compressors import Compressor
from packsaddle.feedback.state import Value, check_tensor

Names = tuple[str, ...]
_SAMPLE = 1 << 17  # coordinates of the model that are looked at; a smaller model's are all


@dataclass(frozen=True)
class _Sample:
    """Some coordinates of a slice's vector, float[m], and how many it has."""

    names: Names  # of the slice's parameters
    size: int
    values: Tensor

    def __post_init__(self) -> None:
        check_tensor("allocation", self.values, None)


class Allocation:
    """The compressor of a model of d coordinates on each of its slices, by the vectors of the step before.

    Each worker has its own, as each has its own k largest; a slice of which nothing is known gets its size's share.
    Slices go by the names of their parameters.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        # Odd, so that it meets all columns of a matrix whose width is a power of two.
        self._stride = max(1, d // _SAMPLE) | 1
        self._last: Mapping[Names, _Sample] = {}  # of the step before, by slice
        self._next: dict[Names, _Sample] = {}
        self._compressor: Compressor | None = None  # of this step
        self._allotted: Mapping[Names, Compressor] = {}

    def begin(self, compressor: Compressor) -> None:
        """Allot a step's compressor."""
        known, self._next, self._compressor = self._last, {}, compressor
        allotted = None
        if sum(sample.size for sample in known.values()) == self.d and len(known) > 1:
            allotted = compressor.apportion([s.values for s in known.values()], [s.size for s in known.values()])
        self._allotted = dict(zip(known, allotted, strict=True)) if allotted else {}

    def of(self, part: Names, compressor: Compressor) -> Compressor | None:
        """Return what this step's compressor is on a slice; None where nothing is known of it, or for another one."""
        return self._allotted.get(part) if compressor == self._compressor else None

    def observe(self, part: Names, vector: Tensor, compressor: Compressor) -> None:
        """Look at a slice's corrected vector, float[n], in this step, if compressors of this kind want to know."""
        if 0 < len(vector) < self.d and type(compressor).apportion is not Compressor.apportion:
            first = min(self._stride, len(vector)) // 2
            self._next[part] = _Sample(part, len(vector), vector[first :: self._stride].clone())

    def close(self, *, apply: bool) -> None:
        """Go by what was observed in this step, or by what was before it."""
        if apply:
            self._last = self._next
        self._next = {}

    def field(self, device: Callable[[], torch.device]) -> Value:
        """Return the field of the saved state: the samples of the last step, loaded to a device."""

        def load(saved: Sequence[_Sample]) -> None:
            self._last = {s.names: replace(s, values=s.values.to(device(), copy=True)) for s in saved}
            self._next, self._allotted = {}, {}

        return Value(("allocation",), list[_Sample], lambda: list(self._last.values()), load)
