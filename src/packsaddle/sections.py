"""Sections of a gradient that are exchanged together, each with its error memory, which is kept by parameter.

DistributedDataParallel hands gradients over in buckets and makes its buckets anew after the first step or two, so what
has not been sent yet belongs to a parameter, never to a bucket.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.average import Averaged
from packsaddle.flat import check_dense_below, dense_strides, goes_dense
from packsaddle.noise import Noise


@dataclass(frozen=True)
class Place:
    """A parameter and where it lies in the vector of all of them: compressed tensors first, dense ones after."""

    name: str
    parameter: Tensor
    dense: bool
    start: int

    @property
    def size(self) -> int:
        """Its coordinates."""
        return self.parameter.numel()


def places(named: Iterable[tuple[str, Tensor]], dense_below: int) -> list[Place]:
    """Return every parameter's place, in the order of the vector, which is that of `CompressedSGD`'s."""
    check_dense_below(dense_below)
    found, start = [], 0
    for name, p in sorted(named, key=lambda item: goes_dense(item[1], dense_below)):  # stable
        found.append(Place(name, p, goes_dense(p, dense_below), start))
        start += p.numel()
    return found


class Section:
    """Some parameters in the order of the vector, and this worker's e^(i) on them, float[n], in units of a gradient.

    A step is tried first (`correct`, `absorb`), on a vector beside the memory, and then taken or forgotten (`settle`):
    whether all workers' gradients were finite shows only when the last section has been exchanged.
    `pending` has what these parameters have gathered elsewhere, by name; what is taken from it is removed.
    """

    def __init__(self, places: Sequence[Place], pending: dict[str, Tensor], device: torch.device) -> None:
        self.places = sorted(places, key=lambda place: place.start)
        self.n = sum(place.size for place in self.places)
        self.compressed_n = sum(place.size for place in self.places if not place.dense)
        dtype = torch.float32
        for place in self.places:
            dtype = torch.promote_types(dtype, place.parameter.dtype)
        self.error = torch.zeros(self.n, dtype=dtype, device=device)
        self.corrected = torch.zeros_like(self.error)
        self._tried = False
        for place, view in self.views(self.error):
            if (known := pending.pop(place.name, None)) is not None:
                view.copy_(known)

    def views(self, vector: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Yield each parameter's part of a vector, float[n], in its shape and memory format.

        Of a shorter one, float[compressed_n], the compressed parameters', which come first.
        """
        start = 0
        for place in self.places:
            if start + place.size > len(vector):
                return
            p = place.parameter
            yield place, vector.as_strided(p.shape, dense_strides(p), vector.storage_offset() + start)
            start += place.size

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the compressed tensors, in order."""
        return [place.parameter.shape for place in self.places if not place.dense]

    def correct(
        self, grads: Mapping[str, Tensor], noise: Noise | None, scale: float, factors: Mapping[str, float]
    ) -> Tensor:
        """Return factor e + grad / scale + xi, float[n] (line 10 of Algorithm 1), in `corrected`; e is left as it is.

        `factors` are by parameter, 1 where none is given; coordinates of xi are those of the whole vector.
        """
        self._tried = True
        memory = [view for _, view in self.views(self.error)]
        for (place, v), e in zip(self.views(self.corrected), memory, strict=True):
            g, factor = grads[place.name], factors.get(place.name, 1.0)
            if scale == 1.0:
                torch.add(g, e, alpha=factor, out=v)
            else:
                torch.mul(e, factor, out=v).add_(g, alpha=1 / scale)
        if noise is not None:
            for first, last, start in self._stretches():
                noise.add_to(self.corrected[first:last], 1.0, start)
        return self.corrected

    def _stretches(self) -> Iterator[tuple[int, int, int]]:
        """Yield where this vector follows the whole one without a gap: from, to, and where that is in the whole."""
        first = last = begin = 0
        for place in self.places:
            if last > first and place.start != begin + last - first:
                yield first, last, begin
                first = last
            if last == first:
                begin = place.start
            last += place.size
        if last > first:
            yield first, last, begin

    def deliver(self, g: Averaged, grads: Mapping[str, Tensor], scale: float) -> Tensor | None:
        """Write mean_i g^(i), times the scale, over the gradients (line 11).

        Returns what 16-bit gradients could not take of it, the same on every worker, float[n]; else None.
        """
        mean = torch.zeros_like(self.corrected)
        for term in g.mean:
            term.add_to(mean[: self.compressed_n], 1.0)
        mean[self.compressed_n :] = g.dense
        exact = all(out.element_size() >= mean.element_size() for out in grads.values())
        for place, view in self.views(mean):
            out = grads[place.name]
            torch.mul(view, scale, out=out)
            if not exact:
                view.sub_(out, alpha=1 / scale)
        return None if exact else mean

    def absorb(self, g: Averaged, lost: Tensor | None) -> None:
        """Leave in `corrected` what has not been sent or could not be taken (line 12)."""
        for term in g.own:
            term.add_to(self.corrected[: self.compressed_n], -1.0)
        self.corrected[self.compressed_n :].zero_()
        if lost is not None:
            self.corrected.add_(lost)

    def leave(self, names: Collection[str]) -> None:
        """Leave e as it was on these parameters."""
        for (place, new), (_, old) in zip(self.views(self.corrected), self.views(self.error), strict=True):
            if place.name in names:
                new.copy_(old)

    def settle(self, *, taken: bool) -> None:
        """Make the step that was tried the state, or forget it."""
        if self._tried and taken:
            self.error, self.corrected = self.corrected, self.error
        self._tried = False
