"""Parameters as one flat vector, float[d], in which tensors that are sent compressed come before tensors that are sent
uncompressed.

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
    """A flat vector, float[d], of the coordinates of some parameters, and its views.

    There is one view for each parameter, and it has the shape of the parameter.
    """

    flat: Tensor
    views: list[Tensor]


class Trainable(Protocol):
    """An object with the attribute `requires_grad`, which is True while a parameter is trained. It is the parameter
    itself, or a substitute."""

    @property
    def requires_grad(self) -> bool: ...


@dataclass(frozen=True)
class Place:
    """A parameter and its position in the vector of all parameters."""

    name: str
    parameter: Tensor  # the parameter, or a substitute that has the same shape, dtype and memory format
    dense: bool  # True if the parameter is sent uncompressed
    start: int  # offset in the vector of all parameters
    group: int = 0  # index of the optimizer's parameter group that contains the parameter
    trained: Trainable | None = None  # its `requires_grad` is False while the parameter is frozen; None: never frozen

    @property
    def size(self) -> int:
        return self.parameter.numel()

    @property
    def is_frozen(self) -> bool:
        return self.trained is not None and not self.trained.requires_grad


class Slice:
    """A set of parameters as one vector, float[d]. Their order is the same as in the vector of all parameters.

    `places` has the `Place` of each parameter, in the order in which they were given. The method `views` returns views
    in this order too. Vectors made by `zeros` are in at least float32.
    """

    def __init__(self, places: Sequence[Place], device: torch.device) -> None:
        self.places = list(places)
        self.names = [place.name for place in self.places]
        # sorted() keeps the order of elements with equal keys
        order = sorted(range(len(self.places)), key=lambda i: self.places[i].start)
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
        """Return the views of a vector, float[d]: one for each parameter, in the parameter's shape and memory
        format."""
        first = flat.storage_offset()
        return [
            flat.as_strided(place.parameter.shape, strides, first + offset)
            for place, strides, offset in zip(self.places, self._strides, self._offsets, strict=True)
        ]

    def named(self, flat: Tensor) -> Iterator[tuple[Place, Tensor]]:
        """Yield a pair for each parameter: its `Place`, and its view of the vector `flat`, float[d]."""
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
        """Return the views of the vector `flat`, float[d], that belong to parameters which are frozen now."""
        if not self.has_frozen:
            return []
        return [view for place, view in self.named(flat) if place.is_frozen]

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the compressed parameters, with the dimensions in the order in which they are in memory.

        For a parameter that is the transpose of an n x m matrix, this is (n, m).
        """
        strides, found = dict(zip(self.names, self._strides, strict=True)), []
        for place in self._in_order:
            if not place.dense:
                # Dimensions of size 1 come last, since their strides have no meaning.
                shape, stride = place.parameter.shape, strides[place.name]
                sizes = sorted(zip((size == 1 for size in shape), (-step for step in stride), shape, strict=True))
                found.append(torch.Size(size for _, _, size in sizes))
        return found

    def add_noise(self, out: Tensor, noise: GaussianNoise) -> None:
        """Add a step's `noise` to `out`, float[d], a vector of the parameters in this slice, in place.

        The noise is a vector with one number for each coordinate of all parameters. Each coordinate of `out` is the
        coordinate of a parameter, and the number for this coordinate is added to it.
        """
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
    """A range of coordinates of the flat vector that belong to one parameter group, and so have the same learning
    rate."""

    group: int
    start: int
    stop: int


class FlatParameters(Slice):
    """The parameters of an optimizer as one flat vector x, float[d].

    In x the tensors that are sent compressed come first. `places` and `views` are in another order: that of the
    parameters in the optimizer.

    `groups` are the optimizer's parameter groups. A tensor is sent uncompressed if it has fewer than `dense_below`
    elements, or fewer than two dimensions, as biases and norms have. With `dense_below=0` all tensors are compressed.
    Raises ValueError if there is no parameter, if a parameter is not floating-point, if parameters differ in dtype or
    device, or if they share memory.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], dense_below: int) -> None:
        self.parameters: list[Tensor] = [p for g in groups for p in g["params"]]
        if not self.parameters:
            raise ValueError("params must have at least one parameter, and every parameter group is empty")
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
        # sorted() keeps the order of elements with equal keys
        for i in sorted(range(len(dense)), key=lambda i: dense[i]):
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
        """Return the coordinates of a flat vector, float[d], in the order of the parameters in the optimizer.

        This is the order of torch's parameters_to_vector, while in x compressed tensors come first.
        """
        return torch.cat([view.reshape(-1) for view in self.views(flat)])

    def change(self, work: Callable[[Tensor], None]) -> Tensor | None:
        """Change the parameters x by a call of `work`, and return the rounding error of x, float[d].

        `work` gets x in at least float32, and changes it in place. If x has 16 bits, `work` gets a copy, which is then
        rounded to x. If x is in at least float32, the result is None. Frozen parameters keep their values.
        """
        frozen = [(view, view.clone()) for view in self.frozen(self.x)]
        exact = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        work(exact)
        lost = None if exact is self.x else self.x.copy_(exact) - exact
        for view, before in frozen:
            view.copy_(before)
        return lost

    def check_attached(self) -> None:
        """Raise RuntimeError if a parameter is no longer a view of the flat vector x, because it was moved or
        replaced."""
        base, size = self.x.data_ptr(), self.x.element_size()
        for name, p, offset in zip(self.names, self.parameters, self._offsets, strict=True):
            if p.numel() and p.data_ptr() != base + offset * size:
                raise RuntimeError(
                    f"{name} was moved or replaced after the optimizer was made, for example by model.to() or by "
                    f"another CompressedSGD; make the optimizer last"
                )

    def check_gradients(self) -> None:
        for p, name in zip(self.parameters, self.names, strict=True):
            if p.grad is not None and p.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient, which is not supported")


def places(
    named: Iterable[tuple[str, Tensor]], dense_below: int, part: Callable[[Tensor], Tensor] = lambda p: p
) -> list[Place]:
    """Return the `Place` of each parameter in one vector of all parameters, in which compressed parameters come first.

    Args:
        named: (name, p) for each parameter p.
        dense_below: parameters with fewer elements are sent uncompressed. The number of elements is that of p, not of
            `part(p)`.
        part: returns the part of p that the vector contains, such as this process's shard; by default p itself.
    """
    found, start = [], 0
    # sorted() keeps the order of elements with equal keys
    for name, p in sorted(named, key=lambda item: is_sent_uncompressed(item[1], dense_below)):
        found.append(Place(name, part(p), is_sent_uncompressed(p, dense_below), start))
        start += found[-1].size
    return found


def is_sent_uncompressed(p: Tensor, dense_below: int) -> bool:
    """Return True if the tensor p is sent uncompressed, i.e. if it has fewer than two dimensions or fewer than
    `dense_below` elements.

    If `dense_below` is 0, the result is always False.
    """
    return dense_below > 0 and (p.ndim < 2 or p.numel() < dense_below)


def strides_of_view(p: Tensor) -> tuple[int, ...]:
    """Return the strides of the view of a flat vector that represents the tensor p.

    They are the strides of p, so that memory formats such as channels_last are kept. If p has gaps in memory, or no
    elements, they are the strides of a contiguous tensor of the same shape.
    """
    return p.stride() if p.numel() and extent(p) == p.numel() else torch.empty(p.shape, device="meta").stride()


def extent(p: Tensor) -> int:
    """Return the number of elements that fit into the memory between the first and the last element of p, both
    included.

    It exceeds the number of elements of p if p has gaps.
    """
    return 1 + sum((size - 1) * stride for size, stride in zip(p.shape, p.stride(), strict=True))


def check_no_shared_memory(named: Mapping[str, Tensor], what: str) -> None:
    """Raise ValueError if two tensors share memory. The message starts with `what`.

    The range of a tensor is the memory from its first to its last element. Two tensors count as sharing memory if their
    ranges overlap. There is one exception: both have gaps, and each of the two ranges has a part outside of the other.
    The columns x[:, :5] and x[:, 5:] are an example.
    """
    # Name, start and stop of each earlier tensor whose range ends after the start of p, and True if the tensor has
    # gaps.
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
