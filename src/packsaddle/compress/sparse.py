"""Compressors that send some coordinates exactly and none of the others: Identity, RandomK, TopK."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compress.base import Compressor, Message
from packsaddle.seeds import Stream, mix, sample_without_replacement


@dataclass(frozen=True)
class Identity(Compressor):
    """C(v) = v: no compression, on the same code path as everything else. mu = 1, linear."""

    linear: ClassVar[bool] = True

    def mu(self, d: int) -> float:
        return 1.0

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        return Message((v.clone(),))

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        out.add_(message.payload[0], alpha=alpha)


@dataclass(frozen=True)
class _KOfD(Compressor):
    """What RandomK and TopK share: k coordinates of d, given as a ratio k/d or as k itself."""

    ratio: float | None = None
    k: int | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if (self.ratio is None) == (self.k is None):
            raise ValueError(f"{name} takes exactly one of ratio and k, got ratio={self.ratio}, k={self.k}")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            hint = "; for a number of coordinates pass k=" if self.ratio > 1 else ""
            raise ValueError(f"ratio of {name} must be in (0, 1], got {self.ratio}{hint}")
        if self.k is not None and (not isinstance(self.k, int) or self.k < 1):
            raise ValueError(f"k of {name} must be a positive integer, got {self.k!r}")

    def validate(self, d: int) -> None:
        if self.k is not None and self.k > d > 0:
            raise ValueError(f"k of {type(self).__name__} must be at most d = {d} (the coordinates), got {self.k}")

    def count(self, d: int) -> int:
        """Return the number of coordinates sent of d: k, or ratio * d rounded and at least one."""
        if self.k is not None:
            return min(self.k, d)
        assert self.ratio is not None  # __post_init__
        return min(d, max(1, round(self.ratio * d)))

    def mu(self, d: int) -> float:
        """Return k/d (for RandomK with equality in Definition 2.1; Stich et al. 2018)."""
        return self.count(d) / d if d else 1.0


@dataclass(frozen=True)
class RandomK(_KOfD):
    """Keep k random coordinates, the same on every worker. mu = k/d, linear, no index bytes.

    Not rescaled by d/k: under error feedback the kept part must be a contraction, not unbiased.
    With `block_size` b > 1 the support is made of runs of b consecutive coordinates (the last one cut so
    that exactly k are kept): every coordinate is still kept with probability k/d, so mu and linearity
    are the same, and memory is moved in runs.
    """

    linear: ClassVar[bool] = True
    block_size: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size of RandomK must be a positive integer, got {self.block_size!r}")

    def support(self, d: int, *, seed: int, step: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the kept coordinates, int64[k], a pure function of (seed, step)."""
        k = self.count(d)
        b = min(self.block_size, max(k, 1))
        if b == 1 or k == d:
            return sample_without_replacement(d, k, seed=seed, step=step, device=device)
        starts = sample_without_replacement(d // b, min(math.ceil(k / b), d // b), seed=seed, step=step, device=device)
        runs = (starts[:, None] * b + torch.arange(b, device=device)).flatten()[:k]
        if len(runs) < k:  # k reaches into the remainder that no full block covers
            runs = torch.cat([runs, torch.arange(d // b * b, d, device=device)[: k - len(runs)]])
        # A fixed pattern on a ring, rotated uniformly, covers each coordinate with probability exactly k/d.
        return runs.add_(mix(seed, step, int(Stream.SUPPORT), b) % d).remainder_(d)

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        support = self.support(v.numel(), seed=seed, step=step, device=v.device)
        return Message((v[support],), support)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        assert message.support is not None
        out.index_add_(0, message.support, message.payload[0].to(out.dtype), alpha=alpha)


@dataclass(frozen=True)
class TopK(_KOfD):
    """Keep the k coordinates of largest magnitude. mu >= k/d, not linear; values and int32 indices travel."""

    linear: ClassVar[bool] = False

    def validate(self, d: int) -> None:
        super().validate(d)
        if d >= 1 << 31:
            raise ValueError(f"TopK codes indices as int32, so d must be below 2^31, got {d}")

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        index = torch.topk(v.abs(), self.count(v.numel()), sorted=False).indices
        return Message((v[index], index.to(torch.int32)))

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        values, index = message.payload
        out.index_add_(0, index, values.to(out.dtype), alpha=alpha)
