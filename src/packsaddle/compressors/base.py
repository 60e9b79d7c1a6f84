"""The compressor interface, and the message of a compressed vector.

A mu-compressor satisfies E||v - C(v)||^2 <= (1 - mu) ||v||^2 for every v. (Definitions and theorems are those of
"Escaping Saddle Points with Compressed SGD". Definition 2.1 has < in place of <=, which fails at v = 0.) A compressor
is *linear* if C(a + b) = C(a) + C(b) for fixed randomness (Definition 2.2). The messages of different workers can then
be averaged by one all-reduce, and Theorem 3.2's faster rate applies.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from packsaddle.compressors.parts import Expected, check_expected, decoding

_PART = 1 << 20  # coordinates; for a longer vector, `message_bytes` extrapolates from a vector of this length


@dataclass(frozen=True)
class Message:
    """The compressed form of a vector. The `parts` are sent to other workers. The `context` is not sent: every receiver
    computes it from the parts, the seed and the step.

    >>> import torch
    >>> from packsaddle import TopK
    >>> message = TopK(k=2).encode(torch.tensor([1.0, -3.0, 2.0, 0.0]), seed=0, step=0)
    >>> sorted(message.parts), message.parts["values"]
    (['indices', 'values'], tensor([-3.,  2.]))
    >>> message.nbytes
    9
    """

    parts: Mapping[str, Tensor]  # flat tensors [n] of any dtype, by name: "values", "indices", "scales", ...
    context: Any = None  # data that is not sent, such as RandomK's indices, which follow from (seed, step)

    @property
    def nbytes(self) -> int:
        """The total size of all parts in bytes."""
        return sum(part.nbytes for part in self.parts.values())


def check_share(name: str, value: Any, hint: str) -> None:
    """Raise ValueError unless `value` is a float in (0, 1]. The text of the error begins with `name`, the name of the
    argument, and contains `hint`, advice to the user. Integers are an error, since 1 could mean one coordinate, 1% or
    everything."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number in (0, 1], got {value!r}")
    if isinstance(value, Integral):
        everything = "; for all of it pass 1.0" if value == 1 else ""
        raise ValueError(f"{name} must be in (0, 1] and not an integer, got {value}; {hint}{everything}")
    if not 0 < float(value) <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}{f'; {hint}' if float(value) > 1 else ''}")


def check_flag(name: str, value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"{name} must be True or False, got {value!r}")


@dataclass(frozen=True)
class Summary:
    """Properties of a compressor class for the documentation's table of compressors and for comparisons of compressors.
    The texts `mu` and `message` are cells of the class's row in that table."""

    mu: str  # formula of the contraction mu
    message: str  # contents of a message
    # Constructor arguments, without the ratio, of each object of the class that comparisons of compressors include.
    variants: Sequence[Mapping[str, Any]] = ({},)


class Compressor(ABC):
    """A (possibly random) map C of flat vectors: `encode` turns v into a message, `add_decoded` adds C(v) to a tensor.

    C satisfies E||v - C(v)||^2 <= (1 - mu) ||v||^2 (Definition 2.1 of "Escaping Saddle Points with Compressed SGD"). A
    subclass is a frozen dataclass with `mu`, `encode` and `add_decoded`. Override also
    - `linear`, to return True, if C is linear; `encode` must then return one floating-point part, linear in v, whose
      length does not depend on v;
    - `context_of` if messages have a context, or contents to validate;
    - `expected_parts`, so that a truncated or corrupted message raises MessageError;
    - `private = True` if the randomness should differ between workers (as for unbiased rounding);
    - `fixed_size = True` if the size of every part depends on d alone; sizes are then not exchanged;
    - `lossless = True` if C(v) = v for every v;
    - `aggregation`, if messages are averaged by neither an all-reduce nor an all-gather;
    - `rate` and `shared_cells`, if the coordinates sent do not depend on the values of v;
    - `summary`, if it is one of the compressors of packsaddle, which `compressors.kinds` lists.

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
    summary: ClassVar[Summary]

    @property
    def linear(self) -> bool:
        """True if C(a + b) = C(a) + C(b) for fixed randomness."""
        return False

    @property
    def aggregation(self) -> str:
        """The name of the collective operation that averages the messages of all workers: "all-reduce", "all-gather",
        or another name that `comm.select_aggregator` maps to an aggregator."""
        return "all-reduce" if self.linear else "all-gather"

    @property
    def needs_tensors(self) -> bool:
        """True if C(v) depends on the shapes of the tensors concatenated in v. Before such a compressor is used, call
        `for_tensors` with these shapes."""
        return self.for_tensors([torch.Size([2, 3])]) != self

    @abstractmethod
    def mu(self, d: int) -> float:
        """Return the contraction mu in (0, 1]: E||v - C(v)||^2 <= (1 - mu) ||v||^2 for every v, float[d]."""

    @abstractmethod
    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        """Compress v, float[d], to a message; v does not change. The randomness is a function of (seed, step)."""

    @abstractmethod
    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha * C(v) to out, float[d], in place. C(v) is decoded from `message`, which `encode` or `receive`
        returned."""

    def receive(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Message:
        """Rebuild another worker's message of d coordinates from its `parts`. `seed` and `step` must be the ones that
        were passed to `encode`. Raises MessageError if the parts do not match `expected_parts`, or do not encode a
        vector of d coordinates."""
        with decoding(self):
            self.check_parts(parts, d)
            return Message(parts, self.context_of(parts, d, seed=seed, step=step))

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> Any:
        """Return the context of a message, i.e. its data that is not sent, computed from its `parts`, which have passed
        `check_parts`. By default it is None. `seed` and `step` are the ones that were passed to `encode`. Raises
        MessageError if the parts do not encode a vector of d coordinates."""
        return None

    def expected_parts(self, d: int) -> Mapping[str, Expected] | None:
        """Return the expected dtype and length of each part of a message, by the part's name, for a vector of d
        coordinates. Returns None if the parts are not checked."""
        return None

    def check_parts(self, parts: Mapping[str, Tensor], d: int) -> None:
        """Raise MessageError if `parts` do not match `expected_parts` for d coordinates."""
        if (expected := _expected_parts(self, d)) is not None:
            check_expected(parts, expected, d)

    def support_of(self, message: Message, d: int) -> Tensor | None:
        """Return the distinct indices of the coordinates in `message`, int64[...], or None if it contains all d."""
        return None

    def validate(self, d: int) -> None:  # noqa: B027 -- optional to override, on purpose
        """Raise ValueError if this compressor does not support vectors of d coordinates."""

    def restrict(self, start: int, stop: int, d: int) -> "Compressor":
        """Return the compressor for the chunk [start, stop) of a vector of d coordinates. A fixed k is scaled down to
        the chunk's fraction of the vector. If the compressor has the lengths of the tensors in the vector, these are
        replaced by the lengths of the tensors' parts in the chunk."""
        return self

    def rate(self, d: int) -> float | None:
        """Return the probability with which a message contains a coordinate of a vector v, float[d], if it is the same
        for all coordinates. Returns None if the probabilities depend on the values of v."""
        return 1.0 if self.lossless else None

    def shared_cells(self, d: int) -> tuple[int, int] | None:
        """Return the number and the size of the cells of a vector v, float[d], if a message has the values of some
        cells of v. Otherwise return None.

        A cell is a run of consecutive coordinates. The cells sent must be identical on all workers and independent of
        the values of v. The context of the message must be the `sparse.Cells` that are sent, and the only part of the
        message must be "values".
        """
        return None

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "Compressor":
        """Return this compressor adapted to vectors that concatenate flattened tensors of these shapes."""
        return self

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        """Predict the message size in bytes for a vector of d coordinates of `itemsize` bytes each.

        The prediction is exact if `expected_parts` has fixed lengths. Otherwise the size is measured on a Gaussian
        vector of at most 2^20 coordinates and scaled to d.
        """
        if (expected := _expected_parts(self, d)) is not None and all(e.least == e.most for e in expected.values()):
            return sum(e.nbytes(itemsize) for e in expected.values())
        dtype, part = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}[itemsize], min(d, _PART)
        v = torch.randn(part, generator=torch.Generator().manual_seed(0)).to(dtype)
        return self.restrict(0, part, d).encode(v, seed=0, step=0).nbytes * (d / part if d else 1)

    def __call__(self, v: Tensor, seed: int = 0, step: int = 0) -> Tensor:
        """Compress and decode v, a flat floating-point tensor. Returns C(v) as a full vector, float[d]. `seed` and
        `step` determine the randomness. The result is detached from v, so it is not differentiable. Raises ValueError
        if v is not flat or not floating-point."""
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


@lru_cache(maxsize=4096)
def part_count(compressor: Compressor, d: int) -> int:
    # A message has the same number of parts for a short vector as for a long one, so encode a short one to save memory.
    part = min(d, _PART)
    return len(compressor.restrict(0, part, d).encode(torch.zeros(part), seed=0, step=0).parts)
