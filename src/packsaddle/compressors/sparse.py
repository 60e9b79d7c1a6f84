"""Sparsifying compressors, which send the values of some coordinates, exact or rounded, and drop all other coordinates.

A vector is divided into cells of consecutive coordinates, so that memory is accessed in contiguous runs.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.compressors.base import Compressor, Message, Summary, check_share
from packsaddle.compressors.chunks import Chunks
from packsaddle.compressors.parts import Expected, check_expected, floats, octets
from packsaddle.compressors.selection import holding, largest
from packsaddle.compressors.values import (
    ValueFormat,
    check_format,
    check_values,
    decode_values,
    encode_values,
    value_count,
    value_parts,
    value_retention,
)
from packsaddle.errors import check_counts
from packsaddle.numerics.seeds import sample_without_replacement

_LONGEST_CHUNK = 1 << 30  # largest valid `chunk`, in coordinates


@dataclass(frozen=True)
class Cells:
    """A subset of the cells of a vector. Cell i has the coordinates from i * size to (i + 1) * size - 1. The last cell
    of the vector may be shorter. The values at m cells are a float tensor of m * size elements, with zeros beyond the
    end of the vector."""

    index: Tensor  # numbers of the cells in the subset, distinct, int64[m]
    size: int  # coordinates per cell

    def coordinates(self, d: int) -> Tensor:
        """Return the indices of the coordinates in these cells, int64[...]. The vector has d coordinates, so the
        indices are below d."""
        if self.size == 1:
            return self.index
        runs = self.index[:, None] * self.size + torch.arange(self.size, device=self.index.device)
        return runs[runs < d]

    def gather(self, v: Tensor) -> Tensor:
        """Return the values at these m cells of v, float[d]. The result has m * size elements, with zeros beyond the
        end of v."""
        if self.size == 1:
            return v.index_select(0, self.index)
        whole, rest = self._split(v)
        values = whole.index_select(0, self.index.clamp_max(len(whole) - 1))
        if self._may_reach(rest, len(whole)):
            padded = torch.nn.functional.pad(rest, (0, self.size - len(rest)))
            values = torch.where(self._is_rest(whole), padded, values)
        return values.view(-1)

    def add_to(self, out: Tensor, values: Tensor, alpha: float) -> None:
        """Add alpha * values to the coordinates of out, float[d], in these cells, in place. `values` has the form that
        `gather` returns."""
        if self.size == 1:
            out.index_add_(0, self.index, values, alpha=alpha)
            return
        whole, rest = self._split(out)
        rows = values.view(-1, self.size) * alpha
        if self._may_reach(rest, len(whole)):
            is_rest, zero = self._is_rest(whole), torch.zeros_like(rows)
            rest.add_(torch.where(is_rest, rows, zero).sum(0)[: len(rest)])
            rows = torch.where(is_rest, zero, rows)
        whole.index_add_(0, self.index.clamp_max(len(whole) - 1), rows)

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return two views of v, which has n full cells: the full cells, float[n, size], and the shorter last cell,
        which may be empty."""
        n = len(v) // self.size
        return v[: n * self.size].view(n, self.size), v[n * self.size :]

    def _may_reach(self, rest: Tensor, n: int) -> bool:
        """Return True if the last cell of a vector is shorter than `size`, and may be in this subset of cells.

        `rest` is the last cell, or empty if all cells have the full size. n is the number of the last cell. On a CPU
        the result is exact. On a GPU it is True whenever `rest` is not empty, so that the host does not wait for
        `index`.
        """
        return len(rest) > 0 and (self.index.device.type != "cpu" or bool((self.index == n).any()))

    def _is_rest(self, whole: Tensor) -> Tensor:
        """Return a mask, bool[m, 1], that is True for the shorter last cell of the vector. `whole` contains the
        vector's full cells. Does not synchronize with a GPU."""
        return (self.index == len(whole))[:, None]


# Largest default size of a cell, in coordinates. Longer runs of memory are hardly copied faster.
_MOST_TOGETHER = 128
# Smallest number of kept cells by default. With fewer cells, the kept energy varies much between steps.
_CELLS_KEPT = 1024


@dataclass(frozen=True)
class Identity(Compressor):
    """The compressor C(v) = v, which sends all values unchanged. It is linear, with mu = 1.

    >>> import torch
    >>> from packsaddle import Identity
    >>> Identity()(torch.tensor([1.0, -3.0]))
    tensor([ 1., -3.])
    >>> Identity().mu(2), Identity().linear
    (1.0, True)
    """

    linear: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    lossless: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary("1", "d values")

    def mu(self, d: int) -> float:
        return 1.0

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        return Message({"values": v.clone()})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        out.add_(message.parts["values"], alpha=alpha)

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return {"values": floats(d)}


@dataclass(frozen=True)
class KOfD(Compressor):
    """Base of compressors that keep k of d coordinates, given as a ratio k/d or as k."""

    # k/d, fraction of the coordinates that is sent, a float in (0, 1].
    ratio: float | None = field(default=None, metadata={"share": True})
    k: int | None = None  # number of coordinates that are sent, instead of the ratio

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.ratio is None) == (self.k is None):
            raise ValueError(f"{name} takes exactly one of ratio and k, got ratio={self.ratio}, k={self.k}")
        if self.ratio is not None:
            check_share(f"ratio of {name}", self.ratio, "for a number of coordinates pass k=, and for 1% 0.01")
            object.__setattr__(self, "ratio", float(self.ratio))
        check_counts(**{f"k of {name}": self.k})

    def validate(self, d: int) -> None:
        if self.k is not None and self.k > d > 0:
            raise ValueError(f"k of {type(self).__name__} must be at most d = {d} (the coordinates), got {self.k}")

    def restrict(self, start: int, stop: int, d: int) -> "KOfD":
        part = stop - start
        return replace(self, k=min(part, max(1, round(self.k * part / d)))) if self.k is not None and part else self

    def count(self, d: int) -> int:
        """Return the number of coordinates to send out of d: k, or ratio * d, rounded and at least 1."""
        if self.k is not None:
            return min(self.k, d)
        assert self.ratio is not None  # guaranteed by __post_init__
        return min(d, max(1, round(self.ratio * d)))

    def mu(self, d: int) -> float:
        """Return the contraction mu = k/d, which is exact for RandomK and a lower bound for TopK (Stich et al.
        2018)."""
        return self.count(d) / d if d else 1.0


@dataclass(frozen=True)
class RandomK(KOfD):
    """A linear compressor that keeps k random coordinates, identical on all workers, and sends no indices; mu = k/d.

    k is given, or is `ratio` * d, rounded and at least 1 (Stich et al. 2018). Values are not rescaled by d/k: error
    feedback needs a contraction, not an unbiased estimate.

    The vector is divided into cells of `block_size` b consecutive coordinates, which makes memory accesses contiguous.
    The fraction k/d of the cells, rounded up, is kept, each cell with the same probability, so a coordinate is kept
    with probability at least k/d. A message has b values per kept cell (for b = 1 exactly k, else fewer than
    k (1 + b/d) + b). By default b is the largest power of two, at most 128, with at least 1,024 kept cells.

    Raises ValueError for an argument out of range, and unless exactly one of ratio and k is given.

    >>> import torch
    >>> from packsaddle import RandomK
    >>> c = RandomK(0.25, block_size=1)
    >>> c(torch.arange(1.0, 9.0), seed=0, step=0).count_nonzero()
    tensor(2)
    >>> c.mu(8), c.linear
    (0.25, True)
    """

    linear: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary(
        "k/d, rounded up to whole cells",
        "k values in cells; no indices, because the seed is shared",
        ({}, {"block_size": 1}),
    )
    block_size: int | None = None  # b, consecutive coordinates kept together; by default 1 to 128, depending on k

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(**{"block_size of RandomK": self.block_size})

    def block(self, d: int) -> int:
        """Return b, the number of consecutive coordinates kept or dropped together, for vectors of d coordinates."""
        k = self.count(d)
        b = min(_MOST_TOGETHER, 1 << max(0, (k // _CELLS_KEPT).bit_length() - 1))
        return min(max(k, 1), self.block_size or b)

    def grid(self, d: int) -> tuple[int, int]:
        """Return the number of cells of a vector of d coordinates, and the number of kept cells."""
        n = -(-d // self.block(d))
        return n, -(-self.count(d) * n // d) if d else 0

    def mu(self, d: int) -> float:
        """Return the contraction mu: the fraction of cells (runs of coordinates) kept, which is at least k/d."""
        n, m = self.grid(d)
        return m / n if d else 1.0

    def rate(self, d: int) -> float:
        return self.mu(d)

    def shared_cells(self, d: int) -> tuple[int, int]:
        return self.grid(d)[0], self.block(d)

    def cells(self, d: int, *, seed: int, step: int, device: torch.device | str = "cpu") -> Cells:
        """Return the cells (runs of coordinates) that are kept of a vector of d coordinates. They are a pure function
        of (seed, step), and their indices are on `device`."""
        n, m = self.grid(d)
        return Cells(sample_without_replacement(n, m, seed=seed, step=step, device=device), self.block(d))

    def support(self, d: int, *, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the indices, out of d, of the coordinates that are kept, int64[...], on `device`. They are a pure
        function of (seed, step)."""
        return self.cells(d, seed=seed, step=step, device=device).coordinates(d)

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        cells = self.cells(v.numel(), seed=seed, step=step, device=v.device)
        return Message({"values": cells.gather(v)}, cells)

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return {"values": floats(self.grid(d)[1] * self.block(d))}

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Cells:
        return self.cells(d, seed=seed, step=step, device=parts["values"].device)

    def support_of(self, message: Message, d: int) -> Tensor:
        cells: Cells = message.context
        return cells.coordinates(d)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        cells: Cells = message.context
        cells.add_to(out, message.parts["values"].to(out.dtype), alpha)


class _CodedSupport(Compressor):
    """Base of compressors that select coordinates by the values of v, so that a message contains coded indices."""

    values: ValueFormat | None

    @abstractmethod
    def select(self, v: Tensor) -> Tensor:
        """Return the indices of the k coordinates of v, float[d], that are sent. The indices are int64[k], in
        increasing order."""

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        index = self.select(v)
        values = encode_values(v.index_select(0, index), self.values)
        return Message({"indices": self._encode_indices(index, len(v)), **values}, index)

    def _encode_indices(self, index: Tensor, d: int) -> Tensor:
        return wire.encode_indices(index, d)

    @abstractmethod
    def _decode_indices(self, parts: Mapping[str, Tensor], d: int) -> Tensor:
        """Return the indices of the coordinates in the `parts` of a message, int64[k], for a vector of d
        coordinates."""

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Tensor:
        check_values(parts, self.values)
        return self._decode_indices(parts, d)

    def support_of(self, message: Message, d: int) -> Tensor:
        index: Tensor = message.context
        return index

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        index: Tensor = message.context
        Cells(index, 1).add_to(out, decode_values(message.parts, self.values, out.dtype, len(index)), alpha)


@dataclass(frozen=True)
class TopK(_CodedSupport, KOfD):
    """A compressor that keeps the k coordinates of largest magnitude; it is not linear. mu >= k/d.

    k is given, or is `ratio` * d, rounded and at least 1 (Stich et al. 2018). A message has values and coded indices.

    With `chunk` n the ratio applies to each run of n consecutive coordinates separately, rounded and at least 1; the
    last run may be shorter. The largest k_j of n_j coordinates have at least the fraction k_j / n_j of their energy, so
    mu is the smallest k_j / n_j over the runs. Coordinates of regions with small magnitudes are then sent too.

    `values` rounds the values to fewer bits, which multiplies mu by `value_retention`; the rounding error goes to the
    error memory.

    Raises ValueError for an argument out of range, and unless exactly one of ratio and k is given.

    >>> import torch
    >>> from packsaddle import TopK
    >>> v = torch.tensor([1.0, -3.0, 2.0, 0.0])
    >>> TopK(k=2)(v)
    tensor([ 0., -3.,  2.,  0.])
    >>> TopK(0.25).mu(4)
    0.25
    >>> TopK(0.5, chunk=2)(v)
    tensor([ 0., -3.,  2.,  0.])
    """

    fixed_size: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary(
        ">= k/d; with chunk the least k/n of a chunk",
        "k values and k coded indices",
        ({}, {"values": "int8"}, {"values": "int2", "chunk": 4096}),
    )
    values: ValueFormat | None = None  # format to which values are rounded; None: no rounding
    chunk: int | None = None  # apply the ratio to each run of this many coordinates; None: to the whole vector

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.values is not None:
            check_format(type(self).__name__, self.values)
        if self.chunk is None:
            return
        if type(self.chunk) is not int or not 1 <= self.chunk <= _LONGEST_CHUNK:
            raise ValueError(f"chunk of TopK must be an integer from 1 to {_LONGEST_CHUNK:,}, got {self.chunk!r}")
        if self.ratio is None:
            raise ValueError(f"chunk of TopK needs a ratio, got k={self.k}; k of each chunk is a ratio of k / chunk")

    def chunks(self, d: int) -> Chunks | None:
        """Return the division of a vector of d coordinates into chunks, or None if `chunk` is None."""
        return None if self.chunk is None else Chunks.of(d, self.chunk, lambda n: KOfD.count(self, n))

    def count(self, d: int) -> int:
        chunks = self.chunks(d)
        return super().count(d) if chunks is None else chunks.total

    def mu(self, d: int) -> float:
        chunks = self.chunks(d)
        return (super().mu(d) if chunks is None else chunks.share) * value_retention(self.values)

    def select(self, v: Tensor) -> Tensor:
        chunks = self.chunks(len(v))
        return largest(v, self.count(len(v))) if chunks is None else chunks.largest(v)

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        chunks, k = self.chunks(d), self.count(d)
        indices = chunks.expected() if chunks else octets(wire.index_bytes(d, k))
        return {"indices": indices, **value_parts(k, self.values)}

    def _encode_indices(self, index: Tensor, d: int) -> Tensor:
        chunks = self.chunks(d)
        return chunks.encode(index) if chunks else super()._encode_indices(index, d)

    def _decode_indices(self, parts: Mapping[str, Tensor], d: int) -> Tensor:
        chunks = self.chunks(d)
        return chunks.decode(parts["indices"]) if chunks else wire.decode_indices(parts["indices"], self.count(d), d)


@dataclass(frozen=True)
class AdaptiveTopK(_CodedSupport):
    """A compressor that keeps the fewest coordinates that have at least the fraction `share` of ||v||^2.

    So ||v - C(v)||^2 <= (1 - share) ||v||^2 for every v, which is the paper's Assumption D. `values` rounds the values
    sent to fewer bits, which reduces mu. The number of coordinates sent varies between steps. Raises ValueError for an
    argument out of range.

    >>> import torch
    >>> from packsaddle import AdaptiveTopK
    >>> AdaptiveTopK(0.5)(torch.tensor([1.0, -3.0, 2.0, 0.0]))
    tensor([ 0., -3.,  0.,  0.])
    >>> AdaptiveTopK(0.9)(torch.tensor([1.0, -3.0, 2.0, 0.0]))
    tensor([ 0., -3.,  2.,  0.])
    """

    summary: ClassVar[Summary] = Summary("the share, for every v", "as TopK; k varies", ({"share": 0.5},))
    share: float = field(metadata={"share": True})  # fraction of ||v||^2 that is sent, in (0, 1]
    values: ValueFormat | None = None  # format to which values are rounded; None: no rounding

    def __post_init__(self) -> None:
        check_share("share of AdaptiveTopK", self.share, "it is of ||v||^2; a number of coordinates is TopK's k=")
        object.__setattr__(self, "share", float(self.share))
        if self.values is not None:
            check_format(type(self).__name__, self.values)

    def mu(self, d: int) -> float:
        return self.share * value_retention(self.values)

    def select(self, v: Tensor) -> Tensor:
        return holding(v, self.share)

    def check_parts(self, parts: Mapping[str, Tensor], d: int) -> None:
        """Raise MessageError unless the dtypes and lengths of `parts` fit the number k of values in the message, which
        must be at most d."""
        k = min(d, value_count(parts, self.values)) if "values" in parts else 0
        check_expected(parts, {"indices": octets(wire.index_bytes(d, k)), **value_parts(k, self.values)}, d)

    def _decode_indices(self, parts: Mapping[str, Tensor], d: int) -> Tensor:
        return wire.decode_indices(parts["indices"], value_count(parts, self.values), d)
