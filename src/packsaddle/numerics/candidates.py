"""Candidates for the k largest magnitudes of a long vector on a CPU, collected in the pass that computes the vector.

The k-th largest magnitudes of the last two selections predict a threshold for the next one. The code that computes the
vector collects the indices of the magnitudes that reach this threshold. The code that selects from the vector ranks
only these magnitudes if there are at least k. Otherwise it ranks all magnitudes, so the selected coordinates never
depend on the prediction.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

Range = tuple[int, int, int]  # (i, start, stop): the elements start to stop - 1 of the i-th tensor in a list
_MARGINS = 0.005, 0.3  # bounds on the distance of the threshold below the predicted magnitude, relative to it
_MOST_GROWTH = 1.5  # largest predicted factor by which the k-th largest magnitude grows or shrinks between selections
_ROOM = 8  # maximum number of collected candidates, as a multiple of k

offered: ContextVar["Candidates | None"] = ContextVar("packsaddle_candidates", default=None)


class Candidates:
    """Indices of coordinates that may have the largest magnitudes among the first n coordinates of one vector, and the
    predicted threshold by which they are collected."""

    def __init__(self, n: int) -> None:
        self.n = n
        # The smallest magnitude to collect, and the maximum number of indices to collect.
        self.threshold, self.room = math.inf, 0
        # The relative distance of the threshold below the prediction, and the k-th largest magnitude in the last
        # selection.
        self._margin, self._last = 0.03, 0.0
        self._found: tuple[int, Tensor] | None = None  # address of the vector; its candidates, int64[m], sorted

    def collect(self, outs: Sequence[Tensor], ranges: Sequence[Range], found: Sequence[Tensor | None]) -> None:
        """Store the candidates that were found while the vector was computed, i.e. the indices of magnitudes that reach
        the threshold. No-op if the ranges do not cover the first n coordinates, or if the candidates of one of them are
        missing.

        Args:
            outs: Views of parts of the vector, in the order of its coordinates.
            ranges: The ranges of elements that were searched. A range is (index in `outs`, start, stop).
            found: For each range, the indices of its candidates in the view, or None if they were not collected.
        """
        parts, end = list[Tensor](), 0
        for (i, start, stop), indices in zip(ranges, found, strict=True):
            first = int(outs[i].storage_offset())
            if first < self.n and first + start == end and indices is not None:
                parts, end = [*parts, indices + first], first + stop
        if end == self.n and self.threshold < math.inf:
            self._found = outs[0].untyped_storage().data_ptr(), torch.cat(parts)

    def discard(self) -> None:
        """Discard the candidates that `collect` has stored. Call before the vector changes."""
        self._found = None

    @contextmanager
    def offer(self) -> Iterator[None]:
        """Context manager that offers these candidates to the code in its block. A selection of the largest magnitudes
        of the vector may then use the candidates, and set the threshold by which the next candidates are collected."""
        token = offered.set(self)
        try:
            yield
        finally:
            offered.reset(token)

    def reached(self, v: Tensor, k: int) -> Tensor | None:
        """Return the indices that `collect` has stored for v, float[n], and discard them. Returns None if no indices
        are stored for v, if fewer than k are stored, or if 8 k or more are stored."""
        found, self._found = self._found, None
        m = len(found[1]) if found is not None and found[0] == v.data_ptr() and len(v) == self.n else _ROOM * k
        # With too few candidates, or too many to be collected, a selection needs another pass over the vector. So widen
        # the margin after few candidates, and narrow it after many.
        factor = 2.0 if m < k else 0.97 if m < 3 * k else 0.8
        self._margin = min(_MARGINS[1], max(_MARGINS[0], factor * self._margin))
        return found[1] if found is not None and k <= m < _ROOM * k else None

    def predict(self, v: Tensor, k: int, least: float) -> None:
        """Set the threshold for the next vector, after a selection of k coordinates from v, float[n]. `least` is the
        k-th largest magnitude in v. The prediction assumes that this magnitude changes again by the factor by which it
        has changed since the previous selection."""
        if len(v) == self.n and 0 < least < math.inf:
            growth = least / (self._last or least)
            predicted = least * min(_MOST_GROWTH, max(1 / _MOST_GROWTH, growth))
            self.threshold, self.room, self._last = predicted * (1 - self._margin), _ROOM * k, least
