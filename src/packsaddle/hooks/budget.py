"""Division of a compressor's budget among the buckets or modules of a model, by the magnitudes of their coordinates.

The budget k is the number of coordinates that the compressor sends of the whole model. A slice is a bucket or a module.

The k largest coordinates of the model are known only at the end of the backward pass, when most slices have already
been sent. So the previous step determines the budgets: the budget of a slice is the number of its coordinates that were
among the k largest of the model. If budgets were proportional to the sizes of the slices instead, a slice with large
gradients would send too few coordinates, and its error memory would grow.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packsaddle.compressors import Compressor
from packsaddle.feedback.state import Value, check_tensor

Names = tuple[str, ...]
# Approximate number of coordinates of a model to sample; of smaller models all coordinates are sampled.
_SAMPLE = 1 << 17


@dataclass(frozen=True)
class _Sample:
    """A sample of the coordinates of a slice (parameters compressed together).

    `values`, float[m], are the sampled coordinates. `size` is the number of all coordinates of the slice.
    """

    names: Names  # the names of the slice's parameters
    size: int
    values: Tensor

    def __post_init__(self) -> None:
        check_tensor("allocation", self.values, None)


class Allocation:
    """Chooses the compressor of each slice (bucket or module) of a model with d coordinates, in each step.

    A slice's part of the budget, i.e. of the number of coordinates to send, follows from samples of the vectors that
    the slices sent in the previous step. Each worker uses its own samples, so workers may choose different compressors.
    """

    def __init__(self, d: int) -> None:
        self.d = d
        # The stride is odd, so that all columns of a matrix are sampled even if its width is a power of two.
        self._stride = max(1, d // _SAMPLE) | 1
        # Samples of the last applied step, by the names of the slice's parameters.
        self._last: Mapping[Names, _Sample] = {}
        self._next: dict[Names, _Sample] = {}
        # Compressor for the whole model in this step; None: no step has begun.
        self._compressor: Compressor | None = None
        self._allotted: Mapping[Names, Compressor] = {}

    def begin(self, compressor: Compressor) -> None:
        """Begin a step: divide the budget of `compressor` among the slices (buckets or modules).

        The budget is the number of coordinates that the compressor sends of the whole model. It is divided only if the
        samples of the previous step are of two or more slices, which together have all d coordinates.
        """
        known, self._next, self._compressor = self._last, {}, compressor
        allotted = None
        if sum(sample.size for sample in known.values()) == self.d and len(known) > 1:
            allotted = compressor.apportion([s.values for s in known.values()], [s.size for s in known.values()])
        self._allotted = dict(zip(known, allotted, strict=True)) if allotted else {}

    def of(self, part: Names, compressor: Compressor) -> Compressor | None:
        """Return the compressor of a slice (bucket or module) in this step, with the slice's part of the budget.

        `part` has the names of the slice's parameters. Returns None if the budget was not divided, if the slice did not
        exist in the previous step, or if `begin` was called with another compressor than `compressor`.
        """
        return self._allotted.get(part) if compressor == self._compressor else None

    def observe(self, part: Names, vector: Tensor, compressor: Compressor) -> None:
        """Sample the vector, float[n], that a slice (bucket or module) sends. The samples determine the budgets of the
        next step.

        `part` has the names of the slice's parameters. No-op if compressors of the type of `compressor` do not divide
        their budget by magnitudes, or if the slice is the whole model.
        """
        if 0 < len(vector) < self.d and type(compressor).apportion is not Compressor.apportion:
            first = min(self._stride, len(vector)) // 2
            self._next[part] = _Sample(part, len(vector), vector[first :: self._stride].clone())

    def close(self, *, apply: bool) -> None:
        """End a step.

        If `apply` is True, the samples of this step determine the budgets of the next step. If it is False, the step
        was rejected, and these samples are discarded. The budgets of the next step then follow from the same samples as
        those of this step.
        """
        if apply:
            self._last = self._next
        self._next = {}

    def field(self, device: Callable[[], torch.device]) -> Value:
        """Return the field of the saved state that contains the last samples of all slices (buckets or modules).

        When a state is loaded, the samples are moved to the device that `device()` returns.
        """

        def load(saved: Sequence[_Sample]) -> None:
            self._last = {s.names: replace(s, values=s.values.to(device(), copy=True)) for s in saved}
            self._next, self._allotted = {}, {}

        return Value(("allocation",), list[_Sample], lambda: list(self._last.values()), load)
