"""Compressors from linear sketches: SketchTopK, which finds TopK's support of a mean, and LinearSketch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from packsaddle.compressors.base import Compressor, Message, check_count, check_flag, check_share
from packsaddle.compressors.parts import Expected, floats
from packsaddle.compressors.selection import largest, largest_of_blocks
from packsaddle.compressors.sparse import KOfD
from packsaddle.numerics.seeds import Stream, add_gaussians, keys, mix
from packsaddle.numerics.sketches import RowHash, estimates_at, median_estimates

_MOST_ROWS = 100  # beyond some ten a median hardly gains
_COUNTERS = 16  # columns of a row for each kept coordinate
_OVERSAMPLE = 4  # candidates for each kept coordinate


class Candidates(NamedTuple):
    """The coordinates whose exact values travel, and which of them stay."""

    coordinates: Tensor  # int64[m], increasing
    kept: Tensor  # int64[k], increasing places in `coordinates`


@dataclass(frozen=True)
class SketchTopK(KOfD):
    """The compressor that finds the k largest coordinates of a mean by a count sketch (Ivkin et al. 2019).

    It keeps the k largest of the P k coordinates of largest estimated magnitude; k is `ratio` * d, rounded and at least
    1, or given. Over workers (`comm.aggregators.SketchedAllReduce`): the sketches are all-reduced, every worker finds
    the same P k candidates in the *mean*, a second all-reduce carries their exact values, and the k of largest exact
    mean magnitude stay; so one support serves all and the mean is compressed, as Theorem 3.1 wants. Called on one
    vector it does the same by itself. P is `oversample`, 4 by default.

    *Sketch.* `rows` R x `columns` c counters. A coordinate's estimate has variance at most ||v||^2 / c in each row (see
    `numerics.sketches`), and the median over rows is taken. Charikar et al. (2002) need c of order k and R of order
    log d; here are the constants. c = 16 k, so that the noise of a row is a quarter of a heavy hitter whose energy is
    1/k of all, and the median's for R = 5 a seventh. What is left are coordinates that *look* heavy. One heavy hitter
    lies in a light coordinate's counter, with a given sign, with probability at most k / (2 c) = 1/32, so the median
    of R = 2 m + 1 rows is a heavy hitter's value with probability at most
    2 C(R, m + 1) 32^-(m + 1) <= 2 4^m 32^-(m + 1) = 8^-m / 16. However large the heavy ones are, all d light
    coordinates make in the mean at most d 8^-m / 16 that tie with them. They are to be at most half of the (P - 1) k
    candidates to spare, 3 k / 2 at P = 4, so m is the least with 8^m >= d / (24 k) and at least 1: R = 3 up to
    d / k = 192, 5 up to 1,536, 7 up to 12,288, ...

    *Bytes.* R c counters and P k values. Counters travel in bfloat16 (`half`; 2 bytes): a worker's rounding, and
    that of each of W hops of the all-reduce, moves a counter by at most 2^-8 of itself, at random, and counters are
    of mean square ||v||^2 / c, so the variance of an estimate grows from ||v||^2 / c by a factor of about
    1 + (W + 1) 2^-16; where partial sums cancel (workers that disagree) by their mean square over ||v||^2 more.
    What is kept are exact values. float16 would be no fewer bytes, needs a scale that all know, which is a round
    more, and rounds nothing that matters less. Where R c + P k would be d or more no sketch is made: all values travel
    and the k largest stay, which is TopK of the mean.

    mu is stated as k/d. Raises ValueError unless exactly one of ratio and k is given, ratio is a float in (0, 1] and
    the others are in range.

    >>> import torch
    >>> from packsaddle import SketchTopK
    >>> v = torch.zeros(10_000)
    >>> v[17] = 5.0
    >>> SketchTopK(k=1)(v).nonzero()
    tensor([[17]])
    """

    rows: int | None = None  # R, over which the median is taken; by default of order log(d / k), odd
    columns: int | None = None  # c, counters of a row; by default 16 k
    oversample: int = _OVERSAMPLE  # P, candidates by kept coordinate; their exact values travel
    half: bool = True  # counters travel in bfloat16, else in the vector's format

    @property
    def aggregation(self) -> str:
        return "sketched all-reduce"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns", "oversample"):
            if getattr(self, name) is not None:
                check_count(f"{name} of SketchTopK", getattr(self, name))
        if self.rows is not None and self.rows > _MOST_ROWS:
            raise ValueError(f"rows of SketchTopK must be at most {_MOST_ROWS}, got {self.rows}: each is a sketch more")
        check_flag("half of SketchTopK", self.half)

    def restrict(self, part: int, d: int) -> "SketchTopK":
        columns = None if self.columns is None else max(1, round(self.columns * part / d))
        return replace(self, columns=columns, k=super().restrict(part, d).k)

    def shape(self, d: int) -> tuple[int, int, int]:
        """Return rows and columns of the sketch of d coordinates, and the number of candidates.

        (0, 0, d) if no sketch is made, since the values themselves are no more numbers.
        """
        if not d:
            return 0, 0, 0
        k = self.count(d)
        tied = d / (8 * (_OVERSAMPLE - 1) * k)
        rows = self.rows or 2 * max(1, math.ceil(math.log(tied, 8))) + 1
        columns = min(d, self.columns or _COUNTERS * k)
        candidates = min(d, self.oversample * k)
        return (rows, columns, candidates) if rows * columns + candidates < d else (0, 0, d)

    def hashes(self, d: int, *, seed: int, step: int) -> list[RowHash]:
        """Return the hash of each row of the sketch of d coordinates, a function of seed and step."""
        rows, columns, _ = self.shape(d)
        return [RowHash.draw(d, columns, seed=seed, step=step, row=r) for r in range(rows)]

    def sketch(self, v: Tensor, hashes: list[RowHash]) -> Tensor:
        """Return the counters of v by the rows' `hashes`, bfloat16 or float[rows * columns]."""
        counters = [h.sketch(v) for h in hashes] or [v[:0]]
        return torch.cat(counters).to(torch.bfloat16 if self.half else v.dtype)

    def candidates(self, counters: Tensor, hashes: list[RowHash], d: int, *, seed: int, step: int) -> Tensor:
        """Return the coordinates of largest estimated magnitude of d, increasing int64[m].

        The counters are [rows * columns], by `hashes` of the same seed and step. Coordinates that share one with a much
        larger one tie with it in that row, so ties must not be broken by position, but from a random place on.
        """
        if not hashes:
            return torch.arange(d, device=counters.device)
        tables = counters.view(len(hashes), -1).to(torch.promote_types(counters.dtype, torch.float32))
        return largest_of_blocks(
            lambda: median_estimates(hashes, tables, d),
            lambda index: estimates_at(hashes, tables, index),
            d,
            self.shape(d)[2],
            first=mix(seed, step, int(Stream.SKETCH)) % d,
        )

    def keep(self, index: Tensor, values: Tensor, d: int) -> Candidates:
        """Return the candidates `index`, int64[m], of d, and which k of them have the largest values, float[m]."""
        return Candidates(index, largest(values, min(len(index), self.count(d) if d else 0)))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        d = len(v)
        hashes = self.hashes(d, seed=seed, step=step)
        counters = self.sketch(v, hashes)
        index = self.candidates(counters, hashes, d, seed=seed, step=step)
        values = v[index]
        return Message({"sketch": counters, "values": values}, self.keep(index, values, d))

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        rows, columns, candidates = self.shape(d)
        sketch = floats(rows * columns, torch.bfloat16 if self.half else None)
        return {"sketch": sketch, "values": floats(candidates)}

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        self.check_parts(parts, d)
        hashes = self.hashes(d, seed=seed, step=step)
        index = self.candidates(parts["sketch"], hashes, d, seed=seed, step=step)
        return Message(parts, self.keep(index, parts["values"], d))

    def support_of(self, message: Message, d: int) -> Tensor:
        chosen: Candidates = message.context
        return chosen.coordinates[chosen.kept]

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        index, kept = message.context
        out.index_add_(0, index[kept], message.parts["values"][kept].to(out.dtype), alpha=alpha)

    def sketch_bytes(self, d: int, itemsize: int) -> int:
        """Return the bytes of the counters of d coordinates of `itemsize` bytes."""
        rows, columns, _ = self.shape(d)
        return rows * columns * (2 if self.half else itemsize)

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        return self.sketch_bytes(d, itemsize) + self.shape(d)[2] * itemsize


@dataclass(frozen=True)
class LinearSketch(Compressor):
    """The linear compressor C(v) = S^T S v / (1 + omega) of a random sketch S of c rows.

    Messages are all-reduced, and no support is chosen (Charikar et al. 2002; the paper's Definition 2.2). The
    sketch "count" is one row of a count sketch, omega = (d - n) / c with n the size of the last chunk of c
    (see `numerics.sketches`), so mu = 1 / (1 + omega) is c / d if c divides d, and never below the c / (c + d - 1)
    of a sketch with independent hashes. The sketch "gaussian" has independent N(0, 1/c) entries, omega = (d + 1) / c,
    at the cost of c d Gaussians a step, so for small problems. S^T S v is unbiased with variance
    omega ||v||^2, and scaling by 1 / (1 + omega) makes it contract.

    Raises ValueError unless exactly one of ratio and columns is given, in range, and the sketch is one of the two.

    >>> import torch
    >>> from packsaddle import LinearSketch
    >>> c = LinearSketch(0.5)
    >>> a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(c(a + b), c(a) + c(b), atol=1e-6)
    True
    >>> c.mu(64)
    0.5
    """

    fixed_size: ClassVar[bool] = True
    ratio: float | None = field(default=None, metadata={"share": True})  # c/d, counters by coordinate, in (0, 1]
    columns: int | None = None  # c, instead of the ratio
    sketch: Literal["count", "gaussian"] = "count"  # gaussian: c d random numbers a step, so for small problems

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.columns is None):
            raise ValueError(f"LinearSketch takes exactly one of ratio and columns, got {self.ratio}, {self.columns}")
        if self.ratio is not None:
            check_share("ratio of LinearSketch", self.ratio, "for a number of counters pass columns=, and for 1% 0.01")
            object.__setattr__(self, "ratio", float(self.ratio))
        if self.columns is not None:
            check_count("columns of LinearSketch", self.columns)
        if self.sketch not in ("count", "gaussian"):
            raise ValueError(f'sketch of LinearSketch must be "count" or "gaussian", got {self.sketch!r}')

    def restrict(self, part: int, d: int) -> "LinearSketch":
        return self if self.columns is None else replace(self, columns=max(1, round(self.columns * part / d)))

    def width(self, d: int) -> int:
        """Return c, the counters for d coordinates."""
        return max(1, min(d, self.columns if self.columns is not None else round((self.ratio or 0) * d)))

    def omega(self, d: int) -> float:
        """Return the variance of S^T S v over ||v||^2, for d coordinates."""
        if not d:
            return 0.0
        c = self.width(d)
        return (d + 1) / c if self.sketch == "gaussian" else (d - (d % c or c)) / c

    @property
    def linear(self) -> bool:
        return True

    def mu(self, d: int) -> float:
        return 1 / (1 + self.omega(d)) if d else 1.0

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        d = len(v)
        if not d:
            return Message({"sketch": v}, (seed, step))
        if self.sketch == "count":
            return Message({"sketch": RowHash.draw(d, self.width(d), seed=seed, step=step).sketch(v)}, (seed, step))
        counters = [rows @ v for rows in self._gaussian_rows(d, v, seed, step)]
        return Message({"sketch": torch.cat(counters)}, (seed, step))

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return {"sketch": floats(self.width(d) if d else 0)}

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        self.check_parts(parts, d)
        return Message(parts, (seed, step))

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        d, (seed, step), scale = len(out), message.context, alpha / (1 + self.omega(len(out)))
        if not d:
            return
        counters = message.parts["sketch"].to(out.dtype)
        if self.sketch == "count":
            RowHash.draw(d, self.width(d), seed=seed, step=step).add_transposed(counters, out, scale)
            return
        for rows, part in zip(
            self._gaussian_rows(d, out, seed, step), torch.split(counters, _GAUSSIAN_ROWS), strict=True
        ):
            out.add_(rows.T @ part, alpha=scale)

    def _gaussian_rows(self, d: int, like: Tensor, seed: int, step: int) -> list[Tensor]:
        """Return S in blocks of rows: the same on every device, as each worker makes its own."""
        c, blocks = self.width(d), []
        for start in range(0, c, _GAUSSIAN_ROWS):
            rows = like.new_zeros(min(_GAUSSIAN_ROWS, c - start), d)
            add_gaussians(rows.view(-1), c**-0.5, keys(mix(seed, start), step, Stream.SKETCH))
            blocks.append(rows)
        return blocks

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        return self.width(d) * itemsize if d else 0


_GAUSSIAN_ROWS = 64
