"""The contract of a compressor, the message it makes, and a schedule that changes a compressor's ratio along a run.

A mu-compressor satisfies E||v - C(v)||^2 <= (1 - mu) ||v||^2 for every v (Definition 2.1, read with <=
because its strict < fails at v = 0). It is *linear* when C(a + b) = C(a) + C(b) for fixed randomness
(Definition 2.2): then messages of different workers add up, one all-reduce averages them, and
Theorem 3.2's faster rate applies.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from packsaddle.compressors.parts import Expected, check_expected, decoding

_PART = 1 << 20  # coordinates that are compressed to predict the bytes of a message of many


@dataclass(frozen=True)
class Message:
    """The message of a vector: `parts` cross the wire; `context` every worker computes for itself.

    >>> import torch
    >>> from packsaddle import TopK
    >>> message = TopK(k=2).encode(torch.tensor([1.0, -3.0, 2.0, 0.0]), seed=0, step=0)
    >>> sorted(message.parts), message.parts["values"]
    (['indices', 'values'], tensor([-3.,  2.]))
    >>> message.nbytes
    10
    """

    parts: Mapping[str, Tensor]  # flat tensors [n], of any dtype, by content: "values", "indices", "scales", ...
    context: Any = None  # from shared randomness, such as RandomK's support; costs no bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())


def check_share(name: str, value: Any, hint: str) -> None:
    """Raise ValueError unless a value is a share in (0, 1], with a hint at what else an integer may have meant.

    An integer 1 would be all of it, where one coordinate (or 1%) was meant at least as often; so 1.0 says all.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
    if isinstance(value, Integral):
        everything = "; for all of it pass 1.0" if value == 1 else ""
        raise ValueError(f"{name} must be in (0, 1] and not an integer, got {value}; {hint}{everything}")
    if not 0 < float(value) <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}{f'; {hint}' if float(value) > 1 else ''}")


def check_flag(name: str, value: Any) -> None:
    """Raise ValueError unless a value is True or False."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


def check_count(name: str, value: Any) -> None:
    """Raise ValueError unless a value is a positive integer, and not True."""
    if type(value) is not int or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


class Compressor(ABC):
    """A (possibly random) map C of flat vectors, written as `encode` to a message and `add_decoded` from it.

    It satisfies E||v - C(v)||^2 <= (1 - mu) ||v||^2 (Definition 2.1 of the paper). A subclass is a frozen dataclass
    with `mu`, `encode` and `add_decoded`; `packsaddle.compressors.testing.check_compressor` tests it. It also overrides
    - `linear`, to return True, if it is; then `encode` makes one floating part, linear in v, whose length v does
      not change;
    - `receive` if its messages have a context; it begins with `check_parts`;
    - `expected_parts`, so that a message that was cut or corrupted raises MessageError;
    - `private = True` if workers should use different randomness (as unbiased rounding should);
    - `fixed_size = True` if the size of every part depends on d alone, which saves announcing sizes;
    - `lossless = True` if C(v) = v for every v, so that nothing is compressed;
    - `aggregation`, if messages are averaged neither by an all-reduce nor by gathering them all;
    - `rates`, and `shared_cells`, if what is sent of v does not depend on its values.

    >>> import torch
    >>> from packsaddle import Compressor, TopK
    >>> c = TopK(k=1)
    >>> isinstance(c, Compressor), c.mu(4), c.linear, c.aggregation
    (True, 0.25, False, 'all-gather')
    >>> v = torch.tensor([1.0, -3.0, 2.0, 0.0])
    >>> c(v)
    tensor([ 0., -3.,  0.,  0.])
    """

    private: ClassVar[bool] = False
    fixed_size: ClassVar[bool] = False
    lossless: ClassVar[bool] = False

    @property
    def linear(self) -> bool:
        """True if C(a + b) = C(a) + C(b) for fixed randomness."""
        return False

    @property
    def aggregation(self) -> str:
        """The exact way to average workers' messages, by its name in `comm.select_aggregator`."""
        return "all-reduce" if self.linear else "all-gather"

    @property
    def needs_tensors(self) -> bool:
        """True if C(v) depends on where the tensors in v begin and end, so that `for_tensors` has an effect."""
        return self.for_tensors([torch.Size([2, 3])]) != self

    @abstractmethod
    def mu(self, d: int) -> float:
        """Return the contraction mu in (0, 1] that holds for every vector of d coordinates."""

    @abstractmethod
    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        """Return the message for v, float[d]; v is not changed. The randomness is a function of (seed, step)."""

    @abstractmethod
    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha * C(v) to out, float[d], in place; `message` is from `encode` or `receive`.

        Raises MessageError if the message is incomplete or out of range; out is then partly changed.
        """

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        """Return another worker's message of d coordinates from its parts; `seed`, `step` are those of its `encode`.

        Raises MessageError unless the parts are as `expected_parts` describes them.
        """
        self.check_parts(parts, d)
        return Message(parts)

    def expected_parts(self, d: int) -> Mapping[str, Expected] | None:
        """Return the description of each part of a message of d coordinates; None if parts are not checked."""
        return None

    def check_parts(self, parts: Mapping[str, Tensor], d: int) -> None:
        """Raise MessageError unless `parts` are as `expected_parts` describes those of d coordinates."""
        if (expected := _expected_parts(self, d)) is not None:
            with decoding(self):
                check_expected(parts, expected, d)

    def support_of(self, message: Message, d: int) -> Tensor | None:
        """Return the coordinates that a message speaks of, int64[...], distinct; None if it speaks of all d.

        Raises MessageError as `add_decoded` does.
        """
        return None

    def validate(self, d: int) -> None:  # noqa: B027 -- optional to override, on purpose
        """Raise ValueError if this compressor cannot act on vectors of d coordinates."""

    def restrict(self, part: int, d: int) -> "Compressor":
        """Return what this compressor is on `part` coordinates of d, where a protocol compresses chunks."""
        return self

    def rates(self, d: int) -> list[tuple[int, float]] | None:
        """Return in what share of the steps a coordinate is sent, if v's values do not matter; else None.

        Pairs of a number of coordinates and their share, for stretches of v one after the other, d together.
        """
        return [(d, 1.0)] if self.lossless else None

    def shared_cells(self, d: int) -> tuple[int, int] | None:
        """Return number and size of the cells of v, float[d], if messages are the values at some of them; else None.

        All workers know which cells these are, and v's values do not matter; the message's context is the
        `sparse.Cells`, and "values" its one part.
        """
        return None

    def apportion(self, samples: Sequence[Tensor], sizes: Sequence[int]) -> "list[Compressor] | None":
        """Return what this compressor is on each of several sections, if it chooses among the coordinates of them all.

        `samples` are some coordinates of each section, float[1 or more], `sizes` how many coordinates it has. None if
        what it does on a section does not depend on the other sections' magnitudes.
        """
        return None

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "Compressor":
        """Return this compressor for vectors that are tensors of these shapes, one after the other."""
        return self

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        """Predict the bytes of the message of a vector of d coordinates of `itemsize` bytes.

        Exact if `expected_parts` have fixed lengths. Else a Gaussian vector, or a million coordinates of it, is
        compressed and its message weighed.
        """
        if (expected := _expected_parts(self, d)) is not None and all(e.least == e.most for e in expected.values()):
            return sum(e.nbytes(itemsize) for e in expected.values())
        dtype, part = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize], min(d, _PART)
        v = torch.randn(part, generator=torch.Generator().manual_seed(0)).to(dtype)
        return self.restrict(part, d).encode(v, seed=0, step=0).nbytes * (d / part if d else 1)

    def __call__(self, v: Tensor, seed: int = 0, step: int = 0) -> Tensor:
        """Return the dense C(v), float[d], for a flat floating tensor v; raises ValueError on any other input.

        It is not differentiable: a gradient that v requires does not pass through it.
        """
        if v.ndim != 1 or not v.is_floating_point():
            raise ValueError(f"v must be a flat floating-point tensor, got shape {tuple(v.shape)} of {v.dtype}")
        self.validate(v.numel())
        v = v.detach()
        out = torch.zeros_like(v)
        self.add_decoded(self.encode(v, seed=seed, step=step), out)
        return out


@lru_cache(maxsize=256)
def _expected_parts(compressor: Compressor, d: int) -> Mapping[str, Expected] | None:
    return compressor.expected_parts(d)


@dataclass(frozen=True)
class RatioRamp:
    """The compressor for a step: its ratio falls geometrically from `first` to the compressor's own at step `stop`.

    Deep Gradient Compression (Lin et al. 2018, section 3.3) warms up so, from 25% over the first epochs. Raises
    ValueError if the compressor has no ratio, if `first` is below it or above 1, or if `stop` is below 1.

    >>> from packsaddle import RatioRamp, TopK
    >>> ramp = RatioRamp(TopK(0.01), stop=100)
    >>> [round(ramp(step).ratio, 4) for step in (0, 50, 100)]
    [0.25, 0.05, 0.01]
    """

    compressor: Compressor  # with a ratio: TopK, RandomK, SharedTopK, SketchTopK, LinearSketch
    stop: int  # step from which on the compressor's own ratio holds, at least 1
    first: float = 0.25  # ratio of step 0, in (0, 1]

    def __post_init__(self) -> None:
        ratio = getattr(self.compressor, "ratio", None)
        if not (is_dataclass(self.compressor) and isinstance(ratio, float)):
            raise ValueError(
                f"compressor of RatioRamp must have a ratio, as RandomK(0.01) has, got {self.compressor!r}"
            )
        check_share("first of RatioRamp", self.first, "it is a share of the coordinates, and 1% is 0.01")
        if ratio > self.first:
            raise ValueError(f"first of RatioRamp must be between the ratio {ratio:g} and 1, got {self.first}")
        if self.stop < 1:
            raise ValueError(f"stop of RatioRamp must be at least 1 step, got {self.stop}")

    def __call__(self, step: int) -> Compressor:
        if step >= self.stop:
            return self.compressor
        compressor: Any = self.compressor
        ratio = self.first * (compressor.ratio / self.first) ** (step / self.stop)
        changed: Compressor = replace(compressor, ratio=ratio)
        return changed
