"""Selection of the largest coordinates of each chunk of a vector, and the coding of their indices.

A chunk is a run of consecutive coordinates; all have the same length except the last, which may be shorter. The number
of coordinates kept per chunk is fixed. An index is coded by its gap from the previous index in its chunk. If k of the n
coordinates of a chunk are kept, the code always has the size that the most unfavorable k indices need, which is at most
log2(n / k) + 2 bits per index (see `wire.encode_indices`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.compressors.parts import Expected, octets
from packsaddle.compressors.selection import as_integers
from packsaddle.numerics.kernels import kernel

_SLAB = 1 << 20  # coordinates processed at a time, to bound scratch memory


@dataclass(frozen=True)
class Chunks:
    """The division of a vector into chunks, and the number of coordinates kept in each chunk."""

    whole: int  # number of full chunks
    size: int  # coordinates per full chunk
    kept: int  # coordinates kept per full chunk
    rest: int  # coordinates of the shorter last chunk, below `size`; 0: no such chunk
    kept_of_rest: int  # coordinates kept in the shorter last chunk

    @classmethod
    def of(cls, d: int, size: int, count: Callable[[int], int]) -> "Chunks":
        """Divide d coordinates into chunks of `size`; in a chunk of n coordinates, count(n) are kept."""
        whole, rest = divmod(d, size)
        return cls(whole, size, count(size), rest, count(rest) if rest else 0)

    @property
    def d(self) -> int:
        return self.whole * self.size + self.rest

    @property
    def total(self) -> int:
        return self.whole * self.kept + self.kept_of_rest

    @property
    def share(self) -> float:
        """The smallest fraction of coordinates kept in a chunk, over all chunks, or 1 if there are no chunks."""
        shares = [self.kept / self.size] * bool(self.whole) + [self.kept_of_rest / max(1, self.rest)] * bool(self.rest)
        return min(shares, default=1.0)

    def largest(self, v: Tensor) -> Tensor:
        """Return the indices of the coordinates of largest magnitude in each chunk of v: `kept` indices for each full
        chunk and `kept_of_rest` for the last one. The indices are int64[total], in increasing order. NaN counts as the
        largest magnitude. Among equal magnitudes, the CPU selects the first ones, and other devices those that
        torch.topk selects."""
        if loop := kernel("largest_of_chunks", v):
            index: Tensor = loop(v, self.size, self.kept, self.kept_of_rest)
            return index
        edge, rows = self.whole * self.size, max(1, _SLAB // self.size)
        found = [
            _largest_of_rows(slab.view(-1, self.size), self.kept) + i * rows * self.size
            for i, slab in enumerate(torch.split(v[:edge], rows * self.size))
            if self.whole
        ]
        if self.rest:
            found.append(_largest_of_rows(v[edge:].view(1, -1), self.kept_of_rest) + edge)
        return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64, device=v.device)

    def encode(self, index: Tensor) -> Tensor:
        """Encode `index`, the indices of the kept coordinates as `largest` returns them, to bytes. Returns a tensor
        uint8[...], which is empty if all coordinates are kept."""
        if self.total == self.d:
            return torch.empty(0, dtype=torch.uint8, device=index.device)
        return wire.pack_gaps(index, self.kept, self.size, self._rice_parameter, self._unary_bits)

    def decode(self, coded: Tensor) -> Tensor:
        """Invert `encode`: return the indices of the kept coordinates, int64[total]. Raises MessageError if `coded` has
        too few or too many indices, or an index outside its chunk."""
        if self.total == self.d:
            return torch.arange(self.total, device=coded.device)
        return wire.unpack_gaps(coded, self.total, self.kept, self.size, self._rice_parameter, self.d)

    def expected(self) -> Expected:
        if self.total == self.d:
            return octets(0)
        return octets(wire.rice_bytes(self.total, self._rice_parameter, self._unary_bits))

    @property
    def _rice_parameter(self) -> int:
        return wire.gap_parameter(*((self.size, self.kept) if self.whole else (self.rest, self.kept_of_rest)))

    @property
    def _unary_bits(self) -> int:
        """The number of bits reserved for the unary parts of the Rice codes of all gaps between kept indices. It
        suffices for every choice of the kept indices."""
        b = self._rice_parameter
        return self.whole * wire.gap_bits(self.size, self.kept, b) + wire.gap_bits(self.rest, self.kept_of_rest, b)


def _largest_of_rows(rows: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest magnitudes in each row of a matrix of n rows. The indices refer to the
    flattened matrix, and are int64[n * k], in increasing order."""
    if rows.device.type != "cpu":
        places = torch.topk(rows.abs(), k, dim=1, sorted=False).indices.sort(1).values
        return (places + torch.arange(len(rows), device=rows.device)[:, None] * rows.shape[1]).view(-1)
    magnitudes = as_integers(rows)
    least = torch.topk(magnitudes, k, dim=1).values[:, -1:]
    above, equal = magnitudes > least, magnitudes == least
    kept = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return kept.view(-1).nonzero().squeeze(1)
