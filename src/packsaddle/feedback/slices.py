"""Parameters as one vector, float[d]: the compressed tensors first, the uncompressed ones after.

A `Place` is where a parameter lies in the vector of all parameters. A `Slice` is a vector of some of them: one of
DistributedDataParallel's buckets, a fragment of local updates, or, as `FlatParameters`, all of an optimizer's.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.errors import is_below


@dataclass(frozen=True)
class Shaped:
    """A flat vector, float[d], and its views shaped as the parameters, in the order of the slice's places."""

    flat: Tensor
    views: list[Tensor]


@dataclass(frozen=True)
class Place:
    """A parameter and its place in the vector of all parameters."""

    name: str
    parameter: Tensor  # its shape and memory format count
    dense: bool  # sent uncompressed
    start: int
    group: int = 0  # index of its parameter group
    trained: Tensor | None = None  # the parameter that may be frozen during training; None: it cannot be

    @property
    def size(self) -> int:
        """The number of coordinates."""
        return self.parameter.numel()


class Slice:
    """Some parameters as a vector of their own, float[d], in the order of the whole vector.

    Views of a vector are in the order of `places`. Vectors made here have at least float32.
    """

    def __init__(self, places: Sequence[Place], device: torch.device) -> None:
        self.places = list(places)
        self.names = [place.name for place in self.places]
        order = sorted(range(len(self.places)), key=lambda i: self.places[i].start)  # stable
        self._in_order = [self.places[i] for i in order]
        self.compressed_d = sum(place.size for place in self.places if not place.dense)
        self.d, self._offsets = 0, [0] * len(self.places)
        for i in order:
            self._offsets[i] = self.d
            self.d += self.places[i].size
        self._strides = [dense_strides(place.parameter) for place in self.places]
        self._device, self._dtype = device, torch.float32
        for place in self.places:
            self._dtype = torch.promote_types(self._dtype, place.parameter.dtype)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of a vector, float[d], in the shapes and memory formats of the parameters."""
        first = flat.storage_offset()
        return [
            flat.as_strided(place.parameter.shape, strides, first + offset)
            for place, strides, offset in zip(self.places, self._strides, self._offsets, strict=True)
        ]

    def named(self, flat: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Return the places with their views of a vector, float[d]."""
        return zip(self.places, self.views(flat), strict=True)

    def shaped(self, flat: Tensor) -> Shaped:
        """Return a vector, float[d], with its views."""
        return Shaped(flat, self.views(flat))

    def zeros(self) -> Shaped:
        """Return a vector of zeros, float[d]."""
        return self.shaped(torch.zeros(self.d, dtype=self._dtype, device=self._device))

    @property
    def has_frozen(self) -> bool:
        """True if a parameter has been frozen since construction."""
        return any(place.trained is not None and not place.trained.requires_grad for place in self.places)

    def frozen(self, flat: Tensor) -> list[Tensor]:
        """Return the views of the parameters that have been frozen since construction."""
        if not self.has_frozen:
            return []
        return [view for p, view in self.named(flat) if p.trained is not None and not p.trained.requires_grad]

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the compressed tensors, in the order of the vector."""
        return [place.parameter.shape for place in self._in_order if not place.dense]

    def stretches(self) -> Iterator[tuple[int, int, int]]:
        """Yield each range of this vector that the whole one has without a gap: start, stop, and its start there."""
        first = last = begin = 0
        for place in self._in_order:
            if last > first and place.start != begin + last - first:
                yield first, last, begin
                first = last
            if last == first:
                begin = place.start
            last += place.size
        if last > first:
            yield first, last, begin


def places(
    named: Iterable[tuple[str, Tensor]], dense_below: int, part: Callable[[Tensor], Tensor] = lambda p: p
) -> list[Place]:
    """Return the place of each parameter, in the order of the vector: the uncompressed ones after the others.

    The vector has `part` of each parameter, such as this process's shard, which is sent uncompressed if the whole is.
    Raises ValueError for a `dense_below` below 0.
    """
    check_dense_below(dense_below)
    found, start = [], 0
    for name, p in sorted(named, key=lambda item: goes_dense(item[1], dense_below)):  # stable
        found.append(Place(name, part(p), goes_dense(p, dense_below), start))
        start += found[-1].size
    return found


def check_dense_below(dense_below: int) -> None:
    """Raise ValueError unless it is a number of elements."""
    if is_below(dense_below, 0):
        raise ValueError(f"dense_below must be 0 or more elements, got {dense_below}")


def goes_dense(p: Tensor, dense_below: int) -> bool:
    """Return True if a tensor is a vector or small, and so sent uncompressed; never if `dense_below` is 0."""
    return dense_below > 0 and (p.ndim < 2 or p.numel() < dense_below)


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """Return p's own strides if they fill its numel without gaps, else those of a contiguous tensor."""
    if p.numel() and extent(p) == p.numel():
        return p.stride()
    return torch.empty(p.shape, device="meta").stride()


def extent(p: Tensor) -> int:
    """Return the number of elements from p's first to its last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))
