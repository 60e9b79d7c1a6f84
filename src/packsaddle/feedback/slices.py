"""Parameters as one flat vector x, float[d], of which a part is compressed and the rest goes dense.

The parameters are made views of x, so that an update of k coordinates costs O(k), and an anchor or an error memory is
one tensor, however many layers the network has. `Place` is a parameter's place in the vector, and `Slice` some of
them: one of DistributedDataParallel's buckets, say.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packsaddle.errors import is_below


@dataclass(frozen=True)
class Run:
    """A stretch of the flat vector whose parameters belong to one parameter group (so have one learning rate)."""

    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class Shaped:
    """A flat vector, float[d], and its views shaped as the parameters, in the user's order."""

    flat: Tensor
    views: list[Tensor]


class FlatParameters:
    """The flat vector x and the place of every parameter in it: compressed tensors first, uncompressed ones after.

    `groups` are the optimizer's parameter groups. A tensor is sent uncompressed if it has fewer than `dense_below`
    elements or fewer than two dimensions (biases, norms); `dense_below=0` compresses everything. Raises
    ValueError for parameters that are not floating point, or differ in dtype or device, or share memory.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], dense_below: int) -> None:
        check_dense_below(dense_below)
        self.parameters: list[Tensor] = [p for g in groups for p in g["params"]]
        names = [n for g in groups for n in g.get("param_names", [])]
        self.names = names or [f"parameter {i}" for i in range(len(self.parameters))]
        self._check()
        owner = [i for i, g in enumerate(groups) for _ in g["params"]]
        self.members = [[i for i, o in enumerate(owner) if o == group] for group in range(len(groups))]
        # The order of x: compressed tensors, then uncompressed ones. Neighbors of one group form a run.
        dense = [goes_dense(p, dense_below) for p in self.parameters]
        order = sorted(range(len(self.parameters)), key=lambda i: dense[i])  # stable
        self._offsets = [0] * len(self.parameters)
        self.runs: list[Run] = []  # contiguous, in flat order
        self.d = 0
        for i in order:
            self._offsets[i] = self.d
            stop = self.d + self.parameters[i].numel()
            if self.runs and self.runs[-1].group == owner[i]:
                self.runs[-1] = Run(owner[i], self.runs[-1].start, stop)
            else:
                self.runs.append(Run(owner[i], self.d, stop))
            self.d = stop
        self.compressed = [i for i in order if not dense[i]]  # parameters, in flat order
        self.compressed_d = sum(self.parameters[i].numel() for i in self.compressed)
        self._flatten()

    def _check(self) -> None:
        first = self.parameters[0]
        for name, p in zip(self.names, self.parameters, strict=True):
            if not p.is_floating_point():
                raise ValueError(f"params must be floating point, but {name} is {p.dtype}")
            if (p.dtype, p.device) != (first.dtype, first.device):
                raise ValueError(
                    f"params must share one dtype and device, but {self.names[0]} is {first.dtype} on "
                    f"{first.device} and {name} is {p.dtype} on {p.device}"
                )
        check_no_shared_memory(dict(zip(self.names, self.parameters, strict=True)), "params")

    def _flatten(self) -> None:
        """Move every parameter into one new tensor, keeping its memory format (channels_last, say)."""
        first = self.parameters[0]
        self._strides = [dense_strides(p) for p in self.parameters]
        self.x = torch.empty(self.d, dtype=first.dtype, device=first.device)
        for p, view in zip(self.parameters, self.views(self.x), strict=True):
            view.copy_(p.data)
            p.data = view

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return views of a flat vector, float[d], shaped as the parameters, in the user's order."""
        return [
            flat.as_strided(p.shape, stride, flat.storage_offset() + offset)
            for p, stride, offset in zip(self.parameters, self._strides, self._offsets, strict=True)
        ]

    def shaped(self, flat: Tensor) -> Shaped:
        """Return a flat vector, float[d], with its views."""
        return Shaped(flat, self.views(flat))

    def zeros(self) -> Shaped:
        """Return a vector of zeros, float[d], in at least single precision."""
        dtype = torch.promote_types(self.x.dtype, torch.float32)
        return self.shaped(torch.zeros(self.d, dtype=dtype, device=self.x.device))

    def kinds(self) -> dict[str, str]:
        """Describe the parameters, in the user's order."""
        each = zip(self.names, self.parameters, strict=True)
        return {f"params[{i}]": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(each)}

    def named(self, vectors: Mapping[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Return the parts of some flat vectors, float[d], as "VECTOR of PARAMETER", or the parameter's name alone."""
        return [
            (f"{kind} of {name}" if kind else name, view)
            for kind, vector in vectors.items()
            for name, view in zip(self.names, self.views(vector), strict=True)
        ]

    def in_order(self, flat: Tensor) -> Tensor:
        """Return a flat vector rearranged in the user's order, that of torch's parameters_to_vector."""
        return torch.cat([view.reshape(-1) for view in self.views(flat)])

    def change(self, work: Callable[[Tensor], None]) -> Tensor | None:
        """Apply work(x) to x in place, in at least float32, except to frozen parameters.

        Returns the rounding error of x, float[d], or None if x is at least float32.
        """
        frozen = [(view, view.clone()) for view in self.frozen(self.x)]
        exact = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        work(exact)
        lost = None if exact is self.x else self.x.copy_(exact) - exact
        for view, before in frozen:
            view.copy_(before)
        return lost

    @property
    def has_frozen(self) -> bool:
        """True if a parameter has been frozen since construction."""
        return not all(p.requires_grad for p in self.parameters)

    def frozen(self, flat: Tensor) -> list[Tensor]:
        """Return the views of the parameters that have been frozen since construction."""
        if not self.has_frozen:
            return []
        return [view for p, view in zip(self.parameters, self.views(flat), strict=True) if not p.requires_grad]

    def check_attached(self) -> None:
        """Raise RuntimeError if a parameter no longer lives in x (moved or replaced after construction)."""
        base, size = self.x.data_ptr(), self.x.element_size()
        for name, p, offset in zip(self.names, self.parameters, self._offsets, strict=True):
            if p.numel() and p.data_ptr() != base + offset * size:
                raise RuntimeError(
                    f"{name} was moved or replaced after the optimizer was made (by model.to(), or another "
                    f"CompressedSGD?); make the optimizer last"
                )

    def check_gradients(self) -> None:
        """Raise RuntimeError if a gradient is sparse."""
        for p, name in zip(self.parameters, self.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")


def check_no_shared_memory(named: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError, beginning with `what`, if two tensors have an element in common.

    Views whose elements alternate, such as x[::2] and x[1::2], have none. Of two dtypes they count as sharing.
    """
    before: list[tuple[str, Tensor]] = []  # tensors that extend beyond the start of the next
    for name, p in sorted(named.items(), key=lambda item: item[1].data_ptr()):
        if not p.numel():
            continue
        before = [(n, o) for n, o in before if o.data_ptr() + _extent(o) * o.element_size() > p.data_ptr()]
        for other, o in before:
            if _share_elements(o, p):
                raise ValueError(f"{what} must not share memory, but {other} and {name} do")
        before.append((name, p))


def _extent(p: Tensor) -> int:
    """Return the number of elements from p's first to its last in memory, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def _share_elements(first: Tensor, second: Tensor) -> bool:
    """Return True if two tensors, the first at the lower address, have an element in common; exact for one dtype."""
    start, rest = divmod(second.data_ptr() - first.data_ptr(), first.element_size())
    if rest or first.dtype != second.dtype:
        return True
    taken = torch.zeros(max(_extent(first), start + _extent(second)), dtype=torch.bool)
    taken.as_strided(first.shape, first.stride(), 0).fill_(True)
    return bool(taken.as_strided(second.shape, second.stride(), start).any())


def check_dense_below(dense_below: int) -> None:
    """Raise ValueError unless it is a number of elements."""
    if is_below(dense_below, 0):
        raise ValueError(f"dense_below must be 0 or more elements, got {dense_below}")


def goes_dense(p: Tensor, dense_below: int) -> bool:
    """Tell if a tensor is a vector or small, and so not compressed; never if `dense_below` is 0."""
    return dense_below > 0 and (p.ndim < 2 or p.numel() < dense_below)


def dense_strides(p: Tensor) -> tuple[int, ...]:
    """Return p's own strides if they fill its numel without gaps, else those of a contiguous tensor."""
    if p.numel() and _extent(p) == p.numel():
        return p.stride()
    return torch.empty(p.shape, device="meta").stride()


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


def places(
    named: Iterable[tuple[str, Tensor]], dense_below: int, part: Callable[[Tensor], Tensor] = lambda p: p
) -> list[Place]:
    """Return every parameter's place, in the order of the vector, which is that of `CompressedSGD`'s.

    The vector has `part` of each: a shard, say, which goes dense if the whole would.
    """
    check_dense_below(dense_below)
    found, start = [], 0
    for name, p in sorted(named, key=lambda item: goes_dense(item[1], dense_below)):  # stable
        found.append(Place(name, part(p), goes_dense(p, dense_below), start))
        start += found[-1].size
    return found


class Slice:
    """Some parameters in the order of the whole vector, as a vector of their own, float[d]."""

    def __init__(self, places: Iterable[Place], device: torch.device) -> None:
        self.places = sorted(places, key=lambda place: place.start)
        self.d = sum(place.size for place in self.places)
        self.compressed_d = sum(place.size for place in self.places if not place.dense)
        self._strides = [dense_strides(place.parameter) for place in self.places]
        self._device, self._dtype = device, torch.float32
        for place in self.places:
            self._dtype = torch.promote_types(self._dtype, place.parameter.dtype)

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return each parameter's part of a vector, float[d], in its shape and memory format."""
        found, start = [], vector.storage_offset()
        for place, strides in zip(self.places, self._strides, strict=True):
            found.append(vector.as_strided(place.parameter.shape, strides, start))
            start += place.size
        return found

    def named(self, vector: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Return the same with the parameters' places."""
        return zip(self.places, self.views(vector), strict=True)

    def zeros(self) -> Shaped:
        """Return a vector of zeros, float[d], in at least single precision."""
        flat = torch.zeros(self.d, dtype=self._dtype, device=self._device)
        return Shaped(flat, self.views(flat))

    def frozen(self, flat: Tensor) -> list[Tensor]:
        """Return nothing: a parameter of which gradients are exchanged cannot be frozen."""
        return []

    @property
    def shapes(self) -> list[torch.Size]:
        """The shapes of the compressed tensors, in order."""
        return [place.parameter.shape for place in self.places if not place.dense]

    def stretches(self) -> Iterator[tuple[int, int, int]]:
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
