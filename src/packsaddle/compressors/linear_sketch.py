"""LinearSketch: a compressor that sends a random linear sketch of the vector, a count sketch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import Tensor

from packsaddle.compressors.base import Compressor, Message, Summary, check_share
from packsaddle.compressors.parts import Expected, floats
from packsaddle.errors import check_counts
from packsaddle.numerics.sketches import RowHash


@dataclass(frozen=True)
class LinearSketch(Compressor):
    """The linear compressor C(v) = S^T S v / (1 + omega), with a random matrix S, float[c, d]; S v is all-reduced.

    S^T S v is an unbiased estimate of v with variance omega ||v||^2; scaling by 1 / (1 + omega) makes it a contraction
    with mu = 1 / (1 + omega) (Charikar et al. 2002; the paper's Definition 2.2). S is the matrix of a count sketch that
    has a single row of c counters (see `numerics.sketches`). Then omega = (d - n) / c, where n is the size of the last
    of the chunks of c coordinates into which v is divided. So mu is c / d if c divides d, and never below
    c / (c + d - 1).

    Raises ValueError unless exactly one of ratio and columns is given, and if the given one is out of range.

    >>> import torch
    >>> from packsaddle import LinearSketch
    >>> c = LinearSketch(0.5)
    >>> a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(c(a + b), c(a) + c(b), atol=1e-6)
    True
    >>> c.mu(64)
    0.5
    """

    linear: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary("c/(c + d - 1) or better", "c counters")
    ratio: float | None = field(default=None, metadata={"share": True})  # c/d, counters per coordinate, in (0, 1]
    columns: int | None = None  # c, number of counters, instead of the ratio

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.columns is None):
            raise ValueError(f"LinearSketch takes exactly one of ratio and columns, got {self.ratio}, {self.columns}")
        if self.ratio is not None:
            check_share("ratio of LinearSketch", self.ratio, "for a number of counters pass columns=, and for 1% 0.01")
            object.__setattr__(self, "ratio", float(self.ratio))
        check_counts(**{"columns of LinearSketch": self.columns})

    def restrict(self, start: int, stop: int, d: int) -> "LinearSketch":
        if self.columns is None:
            return self
        return replace(self, columns=max(1, round(self.columns * (stop - start) / d)))

    def width(self, d: int) -> int:
        """Return c, the number of counters to which a vector of d coordinates is compressed."""
        return max(1, min(d, self.columns if self.columns is not None else round((self.ratio or 0) * d)))

    def omega(self, d: int) -> float:
        """Return omega for vectors v of d coordinates: an upper bound, over all v, on the variance E||S^T S v - v||^2
        of the estimate S^T S v, divided by ||v||^2."""
        if not d:
            return 0.0
        c = self.width(d)
        return (d - (d % c or c)) / c

    def mu(self, d: int) -> float:
        return 1 / (1 + self.omega(d)) if d else 1.0

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        sketch = RowHash.draw(len(v), self.width(len(v)), seed=seed, step=step).sketch(v) if len(v) else v
        return Message({"sketch": sketch}, (seed, step))

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return {"sketch": floats(self.width(d) if d else 0)}

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> tuple[int, int]:
        return seed, step

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        d, (seed, step) = len(out), message.context
        if d:
            row = RowHash.draw(d, self.width(d), seed=seed, step=step)
            row.add_transposed(message.parts["sketch"].to(out.dtype), out, alpha / (1 + self.omega(d)))
