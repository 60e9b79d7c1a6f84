"""Compressors from linear sketches: SketchTopK, which finds TopK's support of a mean, and LinearSketch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from packsaddle.compressors.base import Compressor, Message, check_share
from packsaddle.compressors.selection import largest_of_blocks
from packsaddle.compressors.sparse import KOfD
from packsaddle.numerics.seeds import Stream, generator, mix
from packsaddle.numerics.sketches import RowHash, estimates_at, median_estimates

_MOST_ROWS = 100  # beyond some ten a median hardly gains


@dataclass(frozen=True)
class SketchTopK(KOfD):
    """The k coordinates of largest estimated magnitude, from a count sketch (Ivkin et al. 2019).

    Over workers (`comm.aggregators.SketchedAllReduce`): the sketches are all-reduced, every worker finds the same k
    heavy hitters of the *mean*, and a second all-reduce carries their exact values; so one support serves all
    and the mean is compressed, as Theorem 3.1 wants. Called on one vector it does the same by itself.

    `rows` x `columns` counters, columns 4 k by default. A coordinate's estimate has variance at most
    ||v||^2 / columns in each row (see `numerics.sketches`), and the median over rows is taken. mu is about k/d; it
    is stated as k/d. With these defaults few of planted heavy hitters are found (2 to 9 of 50; docs/compressors.md), so
    it is not what to train with.
    """

    rows: int = 3  # of counters, over which the median is taken
    columns: int | None = None  # counters of a row; by default 4 k

    @property
    def aggregation(self) -> str:
        return "sketched all-reduce"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise ValueError(f"{name} of SketchTopK must be a positive integer, got {value!r}")
        if self.rows > _MOST_ROWS:
            raise ValueError(f"rows of SketchTopK must be at most {_MOST_ROWS}, got {self.rows}: each is a sketch more")

    def restrict(self, part: int, d: int) -> "SketchTopK":
        columns = None if self.columns is None else max(1, round(self.columns * part / d))
        return replace(self, columns=columns, k=super().restrict(part, d).k)

    def width(self, d: int) -> int:
        """Return the number of columns for d coordinates; more than d would serve nothing."""
        return max(1, min(d, self.columns or 4 * self.count(d)))

    def hashes(self, d: int, *, seed: int, step: int) -> list[RowHash]:
        """Return the rows' hashes."""
        return [RowHash.draw(d, self.width(d), seed=seed, step=step, row=r) for r in range(self.rows)]

    def heavy_hitters(self, tables: Tensor, hashes: list[RowHash], d: int, *, seed: int, step: int) -> Tensor:
        """Return the k coordinates of largest estimated magnitude, increasing int64[k]; tables float[rows, columns].

        Coordinates that share a counter with a much larger one tie with it in that row, so ties must not be
        broken by position, but from a random place on.
        """
        return largest_of_blocks(
            lambda: median_estimates(hashes, tables, d),
            lambda index: estimates_at(hashes, tables, index),
            d,
            self.count(d),
            first=mix(seed, step, int(Stream.SKETCH)) % d,
        )

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        d = len(v)
        if not d:
            return Message({"sketch": v, "values": v}, torch.empty(0, dtype=torch.int64, device=v.device))
        hashes = self.hashes(d, seed=seed, step=step)
        tables = torch.stack([h.sketch(v) for h in hashes])
        support = self.heavy_hitters(tables, hashes, d, seed=seed, step=step)
        return Message({"sketch": tables.view(-1), "values": v[support]}, support)

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        if not d:
            return Message(parts, torch.empty(0, dtype=torch.int64, device=parts["values"].device))
        hashes = self.hashes(d, seed=seed, step=step)
        tables = parts["sketch"].view(self.rows, -1)
        return Message(parts, self.heavy_hitters(tables, hashes, d, seed=seed, step=step))

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        out.index_add_(0, message.context, message.parts["values"].to(out.dtype), alpha=alpha)

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        return (self.rows * self.width(d) + self.count(d)) * itemsize if d else 0


@dataclass(frozen=True)
class LinearSketch(Compressor):
    """C(v) = S^T S v / (1 + omega) for a random sketch S of c rows: linear, all-reduced, no support to choose.

    sketch "count": one row of a count sketch, omega = (d - n) / c with n the size of the last chunk of c
    (see `numerics.sketches`), so mu = 1 / (1 + omega) is c / d if c divides d, and never below the c / (c + d - 1)
    of a sketch with independent hashes. sketch "gaussian": independent N(0, 1/c) entries, omega = (d + 1) / c,
    at the cost of c d Gaussians a step, so for small problems. S^T S v is unbiased with variance
    omega ||v||^2, and scaling by 1 / (1 + omega) makes it contract.
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
        if self.columns is not None and (type(self.columns) is not int or self.columns < 1):
            raise ValueError(f"columns of LinearSketch must be a positive integer, got {self.columns!r}")
        if self.sketch not in ("count", "gaussian"):
            raise ValueError(f'sketch of LinearSketch must be "count" or "gaussian", got {self.sketch!r}')

    def restrict(self, part: int, d: int) -> "LinearSketch":
        return self if self.columns is None else replace(self, columns=max(1, round(self.columns * part / d)))

    def width(self, d: int) -> int:
        """Return c for d coordinates."""
        return max(1, min(d, self.columns if self.columns is not None else round((self.ratio or 0) * d)))

    def omega(self, d: int) -> float:
        """Return the relative variance of S^T S v."""
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

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
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
        """Return S in blocks of rows."""
        c = self.width(d)
        rng = generator(seed, step, Stream.SKETCH, device=like.device)
        sizes = [min(_GAUSSIAN_ROWS, c - start) for start in range(0, c, _GAUSSIAN_ROWS)]
        return [
            torch.empty(n, d, dtype=like.dtype, device=like.device).normal_(0, c**-0.5, generator=rng) for n in sizes
        ]

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        return self.width(d) * itemsize if d else 0


_GAUSSIAN_ROWS = 64
