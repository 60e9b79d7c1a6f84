"""SharedTopK and SketchTopK: all workers send the same coordinates, selected by a sketch of the mean vector.

SharedTopK divides a vector v into B blocks of b coordinates and keeps K of them: those with the largest energy,
estimated from r random projections of each block. For every v its contraction mu is K / B >= k/d in expectation.

Proof. Block j has energy e_j, and the estimate of its energy is e_j X_j. The X_j are independent and chi squared with r
degrees of freedom, because a Gaussian matrix has the same distribution in all directions. Let e_i >= e_j. Swapping X_i
and X_j preserves probability, and turns each case that keeps j without i into one that keeps i without j. So
P(i is kept) >= P(j is kept). These probabilities sum to K, so by Chebyshev's sum inequality
E[energy kept] = sum_j e_j P(j is kept) >= (K / B) sum_j e_j = (K / B) ||v||^2.

SharedTopK sends B r projections, in 2 bytes each if `half`, and K b values. By default b is the size nearest to
2 r d / k for which whole blocks make k coordinates; projections then take a quarter of the bytes of the values in
float32. For k < sqrt(2 r d) one block of k coordinates is kept, and the fraction K / B is larger. Below
k = sqrt(r d / 2) one block of sqrt(r d / 2) coordinates is kept, which takes the fewest bytes possible.

SketchTopK's sketch has R rows of c columns. Charikar et al. (2002) require c of order k and R of order log d. Here:
- c = 16 k: the standard deviation of a row's estimate is a quarter of a heavy hitter (a coordinate with 1/k of the
  total energy). The standard deviation of the median of R = 5 rows is a seventh of a heavy hitter.
- R = 2 m + 1, with the least m >= 1 for which 8^m >= d / (24 k): 3 rows up to d / k = 192, 5 up to 1,536, 7 up to
  12,288, ... A light coordinate shares its counter with a heavy hitter of a given sign with probability at most
  k / (2 c) = 1/32. So its median of R rows is a heavy hitter's value with probability at most
  2 C(R, m + 1) 32^-(m + 1) <= 8^-m / 16. SketchTopK requests the exact values of 4 k candidates, of which 3 k are
  spare. On average d 8^-m / 16 light coordinates have a heavy hitter's value. They fill at most half of the 3 k.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from packsaddle.compressors.base import Message, Summary, check_flag
from packsaddle.compressors.parts import Expected, floats
from packsaddle.compressors.selection import largest, largest_of_blocks
from packsaddle.compressors.sparse import Cells, KOfD
from packsaddle.errors import check_counts
from packsaddle.numerics.devices import widened
from packsaddle.numerics.seeds import Keys, Stream, add_gaussians, keys, mix
from packsaddle.numerics.sketches import RowHash, estimates_at, median_estimates

_SLAB = 1 << 17  # random numbers generated at a time, so that scratch memory fits a fast cache
_MOST_ROWS = 100  # a median of more rows is hardly more accurate
_COUNTERS = 16  # default number of columns (counters per row of a sketch) for each kept coordinate
_OVERSAMPLE = 4  # default number of candidates for each kept coordinate


class Drawn(NamedTuple):
    """The random choices of a sketch: the projections or hashes that it is computed with, and the coordinate that is
    preferred in ties. They are functions of (seed, step)."""

    numbers: Any  # for SharedTopK, the `Keys` that generate the projections; for SketchTopK, a RowHash per row
    first: int  # index of the coordinate or block that is preferred in ties; the next ones follow cyclically


class Kept(NamedTuple):
    """The context of a message of `SharedSupport`, i.e. data that is not sent, but computed by every worker: the cells
    (ranges of coordinates) of v that C(v) keeps, and the positions of their values in the message."""

    cells: Cells
    which: Tensor | None  # positions of the kept values in the part "values", int64[k], in increasing order; None: all


class SharedSupport(KOfD):
    """Base of compressors that select coordinates by a linear sketch and send their exact values.

    Between workers (`comm.aggregators.SharedSupportAllReduce`) the sketches are all-reduced, every worker selects the
    same coordinates from the mean sketch, and a second all-reduce averages the values.
    """

    half: bool

    @abstractmethod
    def draw(self, d: int, *, seed: int, step: int) -> Drawn:
        """Return the randomness of a sketch of d coordinates, a pure function of `seed` and `step`."""

    @abstractmethod
    def sketch(self, v: Tensor, drawn: Drawn) -> Tensor:
        """Compute the sketch of v, float[d], with the randomness `drawn`. Returns a flat tensor, which is empty if all
        values are sent instead of a sketch."""

    @abstractmethod
    def places(self, sketch: Tensor, drawn: Drawn, d: int) -> Cells:
        """Return the cells (ranges of coordinates) to send of a vector of d coordinates, selected by the vector's
        `sketch`. `drawn` is the randomness of the sketch."""

    @abstractmethod
    def sizes(self, d: int) -> tuple[int, int]:
        """Return two numbers for a vector of d coordinates: the number of elements of the sketch, and the number of
        values that are sent."""

    def keep(self, places: Cells, values: Tensor, d: int) -> Kept:
        """Return the cells (ranges of coordinates) to keep of a vector of d coordinates. `places` are the cells that
        were sent, and `values` their exact values. By default all cells that were sent are kept. Subclasses may select
        some of them by their values."""
        return Kept(places, None)

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        drawn = self.draw(len(v), seed=seed, step=step)
        sketch = self.sketch(v, drawn)
        places = self.places(sketch, drawn, len(v))
        values = places.gather(v)
        return Message({"sketch": sketch, "values": values}, self.keep(places, values, len(v)))

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        numbers, values = self.sizes(d)
        return {"sketch": floats(numbers, *[torch.bfloat16] * self.half), "values": floats(values)}

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Kept:
        places = self.places(parts["sketch"], self.draw(d, seed=seed, step=step), d)
        return self.keep(places, parts["values"], d)

    def support_of(self, message: Message, d: int) -> Tensor:
        kept: Kept = message.context
        return kept.cells.coordinates(d)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        cells, which = message.context
        values = message.parts["values"]
        cells.add_to(out, (values if which is None else values[which]).to(out.dtype), alpha)


@dataclass(frozen=True)
class SharedTopK(SharedSupport):
    """A compressor that keeps the blocks with the largest estimated energy of the workers' mean (after ARC-TopK, 2025).

    k, the number of coordinates to keep of the d coordinates of a vector, is given, or is `ratio` * d, rounded and at
    least 1. The vector is divided into B blocks v_j of b = `block_size` coordinates. K is the smallest number with
    K / B >= k/d. The K blocks with the largest ||G_j v_j||^2 are kept, where v is the mean over workers and G_j,
    float[r, b] with r = `projections`, has independent N(0, 1) entries, identical on all workers. First the projections
    G_j v_j are all-reduced, then the exact values of the K blocks; no indices are sent (arXiv 2510.26709 uses the rows
    of each matrix as blocks). For given blocks C is linear, so the mean of the C(v_i) of all workers i is C(mean v_i):
    this is Algorithm 1 applied to the mean, as in Theorem 3.1.

    mu = K / B >= k/d, in expectation, for every v. The module's docstring has the proof and derives the default block
    size, for which the projections take a quarter of the bytes that the values take in float32. If B r + K b is at
    least d, there are no projections and all values are sent.

    Raises ValueError for an argument out of range, and unless exactly one of ratio and k is given.

    >>> import torch
    >>> from packsaddle import SharedTopK
    >>> v = torch.zeros(1000)
    >>> v[500:520] = 1.0
    >>> kept = SharedTopK(0.1)(v)
    >>> kept[500:520].count_nonzero()
    tensor(20)
    >>> SharedTopK(0.1).aggregation
    'projected all-reduce'
    """

    aggregation: ClassVar[str] = "projected all-reduce"
    fixed_size: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary(
        "K/B >= k/d, in the mean", "projections of each of B blocks, 2 bytes each; K blocks of values"
    )
    block_size: int | None = None  # b, consecutive coordinates kept together; by default about 2 r d / k
    projections: int = 2  # r, random projections per block
    half: bool = True  # send projections in bfloat16, else in the vector's dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(**{f"{name} of SharedTopK": getattr(self, name) for name in ("block_size", "projections")})
        check_flag("half of SharedTopK", self.half)

    def block(self, d: int) -> int:
        """Return the block size b, the number of consecutive coordinates that are kept or dropped together, for vectors
        of d coordinates."""
        if not d:
            return 1
        k = self.count(d)
        if self.block_size is not None:
            return min(k, self.block_size)
        nearest = self.projections * (2 if self.half else 4) * d / k
        kept = max(1, round(k / max(1, nearest)))
        if kept == 1:
            k = min(d, max(k, math.isqrt(round(nearest * k / 4))))
        # Let B be the largest number of blocks of which `kept` blocks are at least the fraction k/d. Return the size of
        # each of B blocks.
        return -(-d // max(1, d * kept // k))

    def grid(self, d: int) -> tuple[int, int, int]:
        """Return the number of blocks of a vector of d coordinates, the number of kept blocks, and the number of random
        projections per block, which is 0 if all blocks are kept."""
        if not d:
            return 0, 0, 0
        b, r = self.block(d), self.projections
        blocks = -(-d // b)
        kept = -(-self.count(d) * blocks // d)
        return (blocks, kept, r) if blocks * r + kept * b < d else (blocks, blocks, 0)

    def mu(self, d: int) -> float:
        """Return the contraction mu: the fraction of the blocks that is kept, K / B, which is at least k/d."""
        blocks, kept, _ = self.grid(d)
        return kept / blocks if d else 1.0

    def sizes(self, d: int) -> tuple[int, int]:
        blocks, kept, rows = self.grid(d)
        return blocks * rows, kept * self.block(d)

    def draw(self, d: int, *, seed: int, step: int) -> Drawn:
        first = mix(seed, step, int(Stream.PROJECTION)) % max(1, self.grid(d)[0])
        return Drawn(keys(seed, step, Stream.PROJECTION), first)

    def sketch(self, v: Tensor, drawn: Drawn) -> Tensor:
        """Return random projections of each block of v, float[d]. They are a flat tensor of blocks * projections
        numbers, in bfloat16 if `half`, otherwise in the dtype of v. The random matrices are generated from the keys in
        `drawn`. Returns an empty tensor if all blocks are kept, since no projections are then needed."""
        rows, sent = self.grid(len(v))[2], torch.bfloat16 if self.half else v.dtype
        return project_blocks(v, self.block(len(v)), rows, drawn.numbers).to(sent) if rows else v[:0].to(sent)

    def places(self, sketch: Tensor, drawn: Drawn, d: int) -> Cells:
        blocks, kept, rows = self.grid(d)
        if not rows:
            return Cells(torch.arange(blocks, device=sketch.device), self.block(d))
        energies = widened(sketch.view(blocks, rows)).square().sum(1)
        index = (largest(energies.roll(-drawn.first), kept) + drawn.first).remainder_(blocks)
        return Cells(index.sort().values, self.block(d))


def project_blocks(v: Tensor, size: int, rows: int, key: Keys) -> Tensor:
    """Return a random projection G_j v_j of each block v_j of the vector v.

    v is float[d], and its blocks have `size` coordinates each; the last block may be shorter. Each G_j is a matrix of
    `rows` x `size` numbers drawn from N(0, 1). A number depends only on `key` and on its block, row and column, so it
    is identical on all workers, and no matrix is stored. Returns float[blocks * rows], in at least float32.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    together = max(1, _SLAB // (size * rows))  # blocks projected at a time
    numbers = torch.empty(together * rows * size, dtype=dtype, device=v.device)
    projected = []
    for i, part in enumerate(torch.split(v, together * size)):
        blocks = -(-len(part) // size)
        padded = torch.nn.functional.pad(part.to(dtype), (0, blocks * size - len(part)))
        g = numbers[: blocks * rows * size].zero_()
        add_gaussians(g, 1.0, key, start=i * together * rows * size)
        projected.append(torch.linalg.vecdot(g.view(blocks, rows, size), padded.view(blocks, 1, size)).view(-1))
    return torch.cat(projected) if projected else torch.zeros(0, dtype=dtype, device=v.device)


@dataclass(frozen=True)
class SketchTopK(SharedSupport):
    """A compressor that keeps the k largest coordinates of the mean, found by a count sketch (Ivkin et al. 2019).

    First the workers' sketches, of `rows` x `columns` counters each, are all-reduced. From the mean sketch, every
    coordinate of the mean vector is estimated. The `oversample` * k coordinates with the largest estimated magnitudes
    are candidates. Then the exact values of the candidates are all-reduced, and the k candidates with the largest exact
    magnitudes are kept. k is given, or is `ratio` * d, rounded and at least 1. All workers keep the same coordinates
    and the mean is compressed, as Theorem 3.1 requires.

    The estimate is the median over rows; in each row its variance is at most ||v||^2 / columns (see
    `numerics.sketches`). The module's docstring derives the default sizes, 16 k columns and O(log(d / k)) rows. If
    sketch and candidates would be d numbers or more, all values are sent instead, and the k largest of their mean are
    kept, as TopK of the mean would.

    `mu` returns k/d. Raises ValueError for an argument out of range, and unless exactly one of ratio and k is given.

    >>> import torch
    >>> from packsaddle import SketchTopK
    >>> v = torch.zeros(10_000)
    >>> v[17] = 5.0
    >>> SketchTopK(k=1)(v).nonzero()
    tensor([[17]])
    """

    aggregation: ClassVar[str] = "sketched all-reduce"
    summary: ClassVar[Summary] = Summary("k/d", "rows x columns counters of 2 bytes; oversample x k values")
    rows: int | None = None  # R, rows of counters; estimates are medians over rows; by default odd, of order log(d / k)
    columns: int | None = None  # c, counters per row; by default 16 k
    oversample: int = _OVERSAMPLE  # P, candidates per kept coordinate; their exact values are sent
    half: bool = True  # send counters in bfloat16, else in the vector's dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(**{f"{name} of SketchTopK": getattr(self, name) for name in ("rows", "columns", "oversample")})
        if self.rows is not None and self.rows > _MOST_ROWS:
            raise ValueError(f"rows of SketchTopK must be at most {_MOST_ROWS}, got {self.rows}: each is a sketch more")
        check_flag("half of SketchTopK", self.half)

    def restrict(self, start: int, stop: int, d: int) -> "SketchTopK":
        columns = None if self.columns is None else max(1, round(self.columns * (stop - start) / d))
        return replace(self, columns=columns, k=super().restrict(start, stop, d).k)

    def shape(self, d: int) -> tuple[int, int, int]:
        """Return the numbers of rows and of columns of the sketch of a vector of d coordinates, and the number of
        candidates, i.e. coordinates whose exact values are sent. Returns (0, 0, d) if all values are sent instead of a
        sketch."""
        if not d:
            return 0, 0, 0
        k = self.count(d)
        tied = d / (8 * (_OVERSAMPLE - 1) * k)
        rows = self.rows or 2 * max(1, math.ceil(math.log(tied, 8))) + 1
        columns = min(d, self.columns or _COUNTERS * k)
        candidates = min(d, self.oversample * k)
        return (rows, columns, candidates) if rows * columns + candidates < d else (0, 0, d)

    def hashes(self, d: int, *, seed: int, step: int) -> list[RowHash]:
        """Return the random hash of each row of the count sketch of a vector of d coordinates, a pure function of
        `seed` and `step`."""
        rows, columns, _ = self.shape(d)
        return [RowHash.draw(d, columns, seed=seed, step=step, row=r) for r in range(rows)]

    def sizes(self, d: int) -> tuple[int, int]:
        rows, columns, candidates = self.shape(d)
        return rows * columns, candidates

    def draw(self, d: int, *, seed: int, step: int) -> Drawn:
        return Drawn(self.hashes(d, seed=seed, step=step), mix(seed, step, int(Stream.SKETCH)) % max(1, d))

    def sketch(self, v: Tensor, drawn: Drawn) -> Tensor:
        """Return the count sketch of v, float[d], with the hashes in `drawn`. It is a flat tensor of rows * columns
        numbers, in bfloat16 if `half`, otherwise in the dtype of v."""
        counters = [h.sketch(v) for h in drawn.numbers] or [v[:0]]
        return torch.cat(counters).to(torch.bfloat16 if self.half else v.dtype)

    def places(self, sketch: Tensor, drawn: Drawn, d: int) -> Cells:
        """Return the candidates, in increasing order. They are the coordinates, out of d, with the largest magnitudes
        estimated from `sketch`.

        In a row of the sketch, coordinates that share a counter with a much larger coordinate all have the same
        estimate. So among equal estimates the coordinates from a random one on, `drawn.first`, are preferred, and after
        the last coordinate the first ones follow.
        """
        hashes = drawn.numbers
        if not hashes:
            return Cells(torch.arange(d, device=sketch.device), 1)
        tables = sketch.view(len(hashes), -1).to(torch.promote_types(sketch.dtype, torch.float32))
        index = largest_of_blocks(
            lambda: median_estimates(hashes, tables, d),
            lambda index: estimates_at(hashes, tables, index),
            d,
            self.shape(d)[2],
            first=drawn.first,
        )
        return Cells(index, 1)

    def keep(self, places: Cells, values: Tensor, d: int) -> Kept:
        """Return the k coordinates to keep of a vector of d coordinates. `places` are the candidates, and `values`
        their exact values. The candidates whose values have the largest magnitudes are kept."""
        which = largest(values, min(len(values), self.count(d) if d else 0))
        return Kept(Cells(places.index[which], 1), which)
