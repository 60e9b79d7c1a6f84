"""Parameters as one vector, float[d], in which compressed tensors precede uncompressed tensors.

A `Place` is a parameter and its position in the vector of all parameters. A `Slice` is a set of parameters that are
exchanged together, as one vector: a bucket of DistributedDataParallel, or with local updates a fragment of the model.
`FlatParameters` is the slice of all parameters of an optimizer. These parameters become views of one tensor x, so that
an update of k coordinates costs O(k).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from packsaddle.feedback.noise import GaussianNoise


@dataclass(frozen=True)
class Shaped:
    """A flat vector, float[d], of some parameters, and its views: one for each parameter, shaped as the parameter."""

    flat: Tensor
    views: list[Tensor]


class Trainable(Protocol):
    """A parameter, or a substitute for one, whose `requires_grad` is True if it is trained."""

    @property
    def requires_grad(self) -> bool: ...


@dataclass(frozen=True)
class Place:
    """A parameter and its position in the vector of all parameters."""

    name: str
    parameter: Tensor  # the parameter, or a tensor with its shape, dtype and memory format
    dense: bool  # True if the parameter is sent uncompressed
    start: int  # offset in the vector of all parameters
    group: int = 0  # index of the parameter's group
    trained: Trainable | None = None  # the parameter is frozen while its `requires_grad` is False; None: never frozen

    @property
    def size(self) -> int:
        return self.parameter.numel()

    @property
    def is_frozen(self) -> bool:
        return self.trained is not None and not self.trained.requires_grad


class Slice:
    """A set of parameters as one vector, float[d], in the same order as in the vector of all parameters.

    `places` has the `Place` of each parameter, and `views` are in the order of `places`. Vectors from `zeros` are in at
    least float32.
    """

    def __init__(self, places: Sequence[Place], device: torch.device) -> None:
        self.places = list(places)
        self.names = [place.name for place in self.places]
        order = sorted(range(len(self.places)), key=lambda i: self.places[i].start)  # sorted() is stable
        self._in_order = [self.places[i] for i in order]
        self.compressed_d = sum(place.size for place in self.places if not place.dense)
        self.start = self._in_order[0].start if order else 0  # offset in the vector of all parameters
        self.d, self._offsets = 0, [0] * len(self.places)
        for i in order:
            self._offsets[i] = self.d
            self.d += self.places[i].size
        self._strides = [strides_of_view(place.parameter) for place in self.places]
        self._device, self._dtype = device, torch.float32
        for place in self.places:
            self._dtype = torch.promote_types(self._dtype, place.parameter.dtype)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Return one view of a vector, float[d], for each parameter, in its shape and memory format."""
        first = flat.storage_offset()
        return [
            flat.as_strided(place.parameter.shape, strides, first + offset)
            for place, strides, offset in zip(self.places, self._strides, self._offsets, strict=True)
        ]

    def named(self, flat: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Yield each parameter's place, and its view of a vector, float[d]."""
        return zip(self.places, self.views(flat), strict=True)

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.views(flat), strict=True))

    def zeros(self) -> Shaped:
        flat = torch.zeros(self.d, dtype=self._dtype, device=self._device)
        return Shaped(flat, self.views(flat))

    @property
    def has_frozen(self) -> bool:
        return any(place.is_frozen for place in self.places)

    def frozen(self, flat: Tensor) -> list[Tensor]:
        """Return the views of a vector, float[d], that belong to currently frozen parameters."""
        if not self.has_frozen:
            return []
        return [view for place, view in self.named(flat) if place.is_frozen]

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the compressed parameters, with dimensions in the order in which they are in memory. For a
        transposed m x n matrix, this is (n, m)."""
        strides, found = dict(zip(self.names, self._strides, strict=True)), []
        for place in self._in_order:
            if not place.dense:
                # Dimensions of size 1, whose strides mean nothing, come last.
                shape, stride = place.parameter.shape, strides[place.name]
                sizes = sorted(zip((size == 1 for size in shape), (-step for step in stride), shape, strict=True))
                found.append(torch.Size(size for _, _, size in sizes))
        return found

    def add_noise(self, out: Tensor, noise: GaussianNoise) -> None:
        """Add noise to out, float[d], a vector of the parameters in this slice, in place. A coordinate gets the noise
        of its index in the vector of all parameters."""
        # Add noise to each range [first, last) of this slice that is contiguous in the vector of all parameters. In
        # that vector, the range starts at `begin`.
        first = last = begin = 0
        for place in self._in_order:
            if last > first and place.start != begin + last - first:
                noise.add_to(out[first:last], 1.0, begin)
                first = last
            if last == first:
                begin = place.start
            last += place.size
        if last > first:
            noise.add_to(out[first:last], 1.0, begin)


@dataclass(frozen=True)
class GroupRange:
    """A range of the flat vector whose coordinates belong to one parameter group, and so have one learning rate."""

    group: int
    start: int
    stop: int


class FlatParameters(Slice):
    """The parameters of an optimizer as one flat vector x, float[d].

    In x the tensors that are sent compressed come first. `places` and `views` are in the order of the parameters in
    the optimizer.

    `groups` are the optimizer's parameter groups. A tensor is sent uncompressed if it has fewer than `dense_below`
    elements or fewer than two dimensions (biases, norms); `dense_below=0` compresses everything. Raises ValueError for
    parameters that are not floating point, or differ in dtype or device, or share memory.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], dense_below: int) -> None:
        self.parameters: list[Tensor] = [p for g in groups for p in g["params"]]
        names = [n for g in groups for n in g.get("param_names", [])]
        names = names or [f"parameter {i}" for i in range(len(self.parameters))]
        first, owner = self.parameters[0], [i for i, g in enumerate(groups) for _ in g["params"]]
        for name, p in zip(names, self.parameters, strict=True):
            if not p.is_floating_point():
                raise ValueError(f"params must be floating point, but {name} is {p.dtype}")
            if (p.dtype, p.device) != (first.dtype, first.device):
                raise ValueError(
                    f"params must share one dtype and device, but {names[0]} is {first.dtype} on {first.device} and "
                    f"{name} is {p.dtype} on {p.device}"
                )
        check_no_shared_memory(dict(zip(names, self.parameters, strict=True)), "params")
        self.members = [[i for i, o in enumerate(owner) if o == group] for group in range(len(groups))]
        # Place the compressed tensors first in x, and the uncompressed ones after them.
        dense, start, found = [is_sent_uncompressed(p, dense_below) for p in self.parameters], 0, dict[int, Place]()
        for i in sorted(range(len(dense)), key=lambda i: dense[i]):  # sorted() is stable
            p = self.parameters[i]
            found[i] = Place(names[i], p, dense[i], start, owner[i], trained=p)
            start += p.numel()
        # Find the ranges of x that belong to one parameter group each.
        self.ranges: list[GroupRange] = []
        for place in found.values():
            stop = place.start + place.size
            if self.ranges and self.ranges[-1].group == place.group:
                self.ranges[-1] = replace(self.ranges[-1], stop=stop)
            else:
                self.ranges.append(GroupRange(place.group, place.start, stop))
        super().__init__([found[i] for i in range(len(found))], first.device)
        # Move the parameters into x, each in its memory format (channels_last, say).
        self.x = torch.empty(self.d, dtype=first.dtype, device=first.device)
        for p, view in zip(self.parameters, self.views(self.x), strict=True):
            view.copy_(p.data)
            p.data = view

    def kinds(self) -> dict[str, str]:
        each = zip(self.names, self.parameters, strict=True)
        return {f"params[{i}]": f"{name} {list(p.shape)} {p.dtype}" for i, (name, p) in enumerate(each)}

    def in_order(self, flat: Tensor) -> Tensor:
        """Return a flat vector of all parameters, float[d], rearranged so that they are in the order in which the
        optimizer has them, i.e. in the order of torch's parameters_to_vector."""
        return torch.cat([view.reshape(-1) for view in self.views(flat)])

    def change(self, work: Callable[[Tensor], None]) -> Tensor | None:
        """Call `work`, which changes the parameter vector x in place, with x in at least float32. Frozen parameters
        keep their values.

        Returns the rounding error of x, float[d], or None if x is at least float32.
        """
        frozen = [(view, view.clone()) for view in self.frozen(self.x)]
        exact = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        work(exact)
        lost = None if exact is self.x else self.x.copy_(exact) - exact
        for view, before in frozen:
            view.copy_(before)
        return lost

    def check_attached(self) -> None:
        """Raise RuntimeError if a parameter was moved or replaced, so that it is no longer a view of the flat vector x
        of all parameters."""
        base, size = self.x.data_ptr(), self.x.element_size()
        for name, p, offset in zip(self.names, self.parameters, self._offsets, strict=True):
            if p.numel() and p.data_ptr() != base + offset * size:
                raise RuntimeError(
                    f"{name} was moved or replaced after the optimizer was made (by model.to(), or another "
                    f"CompressedSGD?); make the optimizer last"
                )

    def check_gradients(self) -> None:
        for p, name in zip(self.parameters, self.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")


def places(
    named: Iterable[tuple[str, Tensor]], dense_below: int, part: Callable[[Tensor], Tensor] = lambda p: p
) -> list[Place]:
    """Return the `Place` of each parameter p, given as (name, p), i.e. its position in one vector of all parameters, in
    which compressed parameters come first. Instead of p, the vector contains `part(p)`, such as this process's shard of
    p. The size of the whole p, not of the part, is compared with `dense_below`."""
    found, start = [], 0
    for name, p in sorted(named, key=lambda item: is_sent_uncompressed(item[1], dense_below)):  # sorted() is stable
        found.append(Place(name, part(p), is_sent_uncompressed(p, dense_below), start))
        start += found[-1].size
    return found


def is_sent_uncompressed(p: Tensor, dense_below: int) -> bool:
    """Return True if the tensor p has fewer than two dimensions or fewer than `dense_below` elements. Always returns
    False if `dense_below` is 0."""
    return dense_below > 0 and (p.ndim < 2 or p.numel() < dense_below)


def strides_of_view(p: Tensor) -> tuple[int, ...]:
    """Return the strides of the view that represents the tensor p in a flat vector. They are the strides of p, so that
    formats such as channels_last are kept. If p has gaps in memory, they are instead the strides of a contiguous
    tensor."""
    return p.stride() if p.numel() and extent(p) == p.numel() else torch.empty(p.shape, device="meta").stride()


def extent(p: Tensor) -> int:
    """Return the number of elements of memory from the first element of the tensor p to its last, gaps included."""
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def check_no_shared_memory(named: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError, with a message that starts with `what`, if two tensors share memory. Tensors count as sharing
    if the ranges of memory from their first to their last element overlap. Only views with gaps are accepted if these
    ranges overlap in part, such as the columns x[:, :5] and x[:, 5:]."""
    # Name, start and stop of each tensor that ends after the start of p, and True if the tensor has gaps.
    before: list[tuple[str, int, int, bool]] = []
    for name, p in sorted(named.items(), key=lambda item: item[1].data_ptr()):
        if not p.numel():
            continue
        start, has_gaps = p.data_ptr(), extent(p) > p.numel()
        stop = start + extent(p) * p.element_size()
        before = [other for other in before if other[2] > start]
        for other, first, last, gaps in before:
            if first == start or last >= stop or not (gaps and has_gaps):
                raise ValueError(f"{what} must not share memory, but {other} and {name} do")
        before.append((name, start, stop, has_gaps))
