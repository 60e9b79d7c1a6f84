"""The contract of a compressor, and the message it makes.

A mu-compressor satisfies E||v - C(v)||^2 <= (1 - mu) ||v||^2 for every v (Definition 2.1, read with <=
because its strict < fails at v = 0). It is *linear* when C(a + b) = C(a) + C(b) for fixed randomness
(Definition 2.2): then messages of different workers add up, one all-reduce averages them, and
Theorem 3.2's faster rate applies.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """C(v) as it travels: `payload` crosses the wire, `support` every worker knows without being told."""

    payload: tuple[Tensor, ...]  # flat tensors
    support: Tensor | None = None  # int64[k], from shared randomness; costs no bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return sum(part.numel() * part.element_size() for part in self.payload)


class Compressor(ABC):
    """A (possibly random) map C of flat vectors, written as `encode` to a message and `add_decoded` from it.

    Subclasses are frozen dataclasses that write `mu`, `encode` and `add_decoded`. A linear one puts a
    single floating tensor in its payload, linear in v.
    """

    linear: ClassVar[bool]

    @abstractmethod
    def mu(self, d: int) -> float:
        """Return the contraction mu in (0, 1] that holds for every vector of d coordinates."""

    @abstractmethod
    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        """Return the message for v, float[d]; v is not changed. The randomness is a function of (seed, step)."""

    @abstractmethod
    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        """Add alpha * C(v) to out, float[d], in place."""

    def validate(self, d: int) -> None:  # noqa: B027 -- optional to override, on purpose
        """Raise ValueError if this compressor cannot act on vectors of d coordinates."""

    def __call__(self, v: Tensor, seed: int = 0, step: int = 0) -> Tensor:
        """Return the dense C(v), float[d], for a flat floating tensor v; raises ValueError on any other input."""
        if v.ndim != 1 or not v.is_floating_point():
            raise ValueError(f"v must be a flat floating-point tensor, got shape {tuple(v.shape)} of {v.dtype}")
        self.validate(v.numel())
        out = torch.zeros_like(v)
        self.add_decoded(self.encode(v, seed=seed, step=step), out)
        return out
