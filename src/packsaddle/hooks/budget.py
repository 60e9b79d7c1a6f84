"""Division of a compressor's budget of k coordinates among the buckets or modules of a model, by their magnitudes.

The k largest coordinates of the model are known only at the end of the backward pass, after most buckets have been
sent. So the budget of each slice (bucket or module) is its number of coordinates among the model's k largest of the
previous step. If budgets were proportional to sizes, a bucket with large gradients would send too few coordinates, and
its error memory would grow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packsaddle.compressors import Compressor
from packsaddle.feedback.state import Value, check_tensor

Names = tuple[str, ...]
_SAMPLE = 1 << 17  # approximate number of coordinates to sample; smaller models are sampled whole


@dataclass(frozen=True)
class _Sample:
    """A sample of the coordinates of a slice, i.e. of parameters that are compressed together. `values`, float[m], are
    the sampled coordinates, and `size` is the number of all coordinates of the slice."""

    names: Names  # the names of the slice's parameters
    size: int
    values: Tensor

    def __post_init__(self) -> None:
        check_tensor("allocation", self.values, None)


class Allocation:
    """Chooses the compressor of each slice (bucket or module) of a model with d coordinates, from samples of the
    vectors that were compressed in the previous step.

    Workers may choose different compressors. The budget of a slice without a sample is proportional to its size.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        # The stride is odd, to sample all columns of a matrix whose width is a power of two.
        self._stride = max(1, d // _SAMPLE) | 1
        self._last: Mapping[Names, _Sample] = {}  # samples of the previous step, by the names of the slice's parameters
        self._next: dict[Names, _Sample] = {}
        self._compressor: Compressor | None = None  # compressor of the whole model in this step
        self._allotted: Mapping[Names, Compressor] = {}

    def begin(self, compressor: Compressor) -> None:
        """Begin a step: divide the budget of `compressor`, i.e. the number of coordinates that it sends, among the
        slices (buckets or modules) that were sampled in the previous step."""
        known, self._next, self._compressor = self._last, {}, compressor
        allotted = None
        if sum(sample.size for sample in known.values()) == self.d and len(known) > 1:
            allotted = compressor.apportion([s.values for s in known.values()], [s.size for s in known.values()])
        self._allotted = dict(zip(known, allotted, strict=True)) if allotted else {}

    def of(self, part: Names, compressor: Compressor) -> Compressor | None:
        """Return the compressor of a slice (bucket or module) in this step. `part` has the names of its parameters.
        Returns None if the slice was not sampled in the previous step, or if `compressor` is not the one with which the
        step began."""
        return self._allotted.get(part) if compressor == self._compressor else None

    def observe(self, part: Names, vector: Tensor, compressor: Compressor) -> None:
        """Sample the vector that a slice (bucket or module) sends, float[n], to divide the budget of the next step.
        No-op if compressors of this type do not divide their budget by magnitudes."""
        if 0 < len(vector) < self.d and type(compressor).apportion is not Compressor.apportion:
            first = min(self._stride, len(vector)) // 2
            self._next[part] = _Sample(part, len(vector), vector[first :: self._stride].clone())

    def close(self, *, apply: bool) -> None:
        """End a step. If `apply` is True, the samples of this step determine the budgets of the next step. Otherwise
        these samples are discarded, and the samples that determined this step's budgets are used again."""
        if apply:
            self._last = self._next
        self._next = {}

    def field(self, device: Callable[[], torch.device]) -> Value:
        """Return the field of the saved state that contains the samples of all slices (buckets or modules). When the
        state is loaded, the samples are moved to `device()`."""

        def load(saved: Sequence[_Sample]) -> None:
            self._last = {s.names: replace(s, values=s.values.to(device(), copy=True)) for s in saved}
            self._next, self._allotted = {}, {}

        return Value(("allocation",), list[_Sample], lambda: list(self._last.values()), load)
