"""Compressors that send every coordinate in few bits: Sign and QSGD."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compress import wire
from packsaddle.compress.base import Compressor, Message
from packsaddle.seeds import Stream, generator


@dataclass(frozen=True)
class Sign(Compressor):
    """C(v) = (||v||_1 / d) sign(v), one bit a coordinate and a scale (Karimireddy et al. 2019).

    ||v - C(v)||^2 = ||v||^2 - ||v||_1^2 / d, so mu = ||v||_1^2 / (d ||v||_2^2): 2/pi for a Gaussian v, 1/d at
    worst. With `per_tensor` each tensor of the model has its own scale. The sign of 0 is taken as +.
    """

    fixed_size: ClassVar[bool] = True
    per_tensor: bool = False
    sizes: tuple[int, ...] = field(default=(), metadata={"internal": True})  # of the tensors in v, from `for_tensors`

    def mu(self, d: int) -> float:
        return 1 / max([1, *self._sizes(d)])

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "Sign":
        return replace(self, sizes=tuple(s.numel() for s in shapes)) if self.per_tensor else self

    def restrict(self, part: int, d: int) -> "Sign":
        # A chunk cuts tensors apart: one scale for it.
        return self if part == d else replace(self, sizes=())

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        # In double precision, where sums of 1e30s do not overflow.
        scales = [
            t.abs().mean(dtype=torch.float64) if len(t) else v.new_zeros((), dtype=torch.float64)
            for t in torch.split(v, self._sizes(len(v)))
        ]
        return Message({"signs": wire.pack_bits(v >= 0), "scales": torch.stack(scales).to(v.dtype)})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        signs, sizes = wire.unpack_bits(message.parts["signs"], len(out)), self._sizes(len(out))
        tensors = zip(message.parts["scales"], torch.split(out, sizes), torch.split(signs, sizes), strict=True)
        for scale, tensor, positive in tensors:
            tensor.add_(torch.where(positive, scale, -scale).to(out.dtype), alpha=alpha)

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        return math.ceil(d / 8) + itemsize * len(self._sizes(d))

    def _sizes(self, d: int) -> list[int]:
        return list(self.sizes) if sum(self.sizes) == d and self.sizes else [d]


@dataclass(frozen=True)
class QSGD(Compressor):
    """Stochastic rounding of |v| / ||v|| to `levels` levels, with signs and the norm (Alistarh et al. 2017).

    The rounded Q(v) is unbiased with E||Q(v) - v||^2 <= omega ||v||^2, omega = min(b / s^2, sqrt(b) / s) for s
    levels and buckets of b coordinates that share a norm; so Q(v) / (1 + omega) is a mu-compressor with
    mu = 1 / (1 + omega), and that is C. A level and its sign take ceil(log2(2 s + 1)) bits.
    """

    private: ClassVar[bool] = True
    fixed_size: ClassVar[bool] = True
    levels: int = 7
    bucket: int = 512

    def __post_init__(self) -> None:
        for name in ("levels", "bucket"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} of QSGD must be a positive integer, got {getattr(self, name)!r}")

    @property
    def bits(self) -> int:
        """Bits of one coordinate."""
        return (2 * self.levels).bit_length()

    def omega(self, d: int) -> float:
        """Return the variance bound of the unscaled Q (Alistarh et al. 2017, Lemma 3.1)."""
        b = min(d, self.bucket)
        return min(b / self.levels**2, math.sqrt(b) / self.levels)

    def mu(self, d: int) -> float:
        return 1 / (1 + self.omega(d))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        d, b = len(v), max(1, min(len(v), self.bucket))
        # bfloat16 has too few bits to round without bias.
        precise = v.to(torch.promote_types(v.dtype, torch.float32))
        buckets = torch.nn.functional.pad(precise, (0, -d % b)).view(-1, b)
        largest = buckets.abs().amax(1, keepdim=True)
        # In units of the largest magnitude neither 1e30 overflows nor a denormal loses its bits.
        unit = torch.where(largest > 0, buckets / largest, buckets)
        norms = unit.norm(dim=1, keepdim=True)
        rng = generator(seed, step, Stream.ROUNDING, device=v.device)
        chance = torch.rand(buckets.shape, generator=rng, device=v.device, dtype=buckets.dtype)
        level = (unit.abs() / norms.clamp_min(1) * self.levels).add_(chance).floor_().clamp_(max=self.levels)
        codes = torch.where(buckets < 0, -level, level).nan_to_num_(0.0).add_(self.levels).view(-1)[:d]
        return Message({"levels": wire.pack(codes.to(torch.int64), self.bits), "scales": (norms * largest).view(-1)})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        d, b = len(out), max(1, min(len(out), self.bucket))
        codes = wire.unpack(message.parts["levels"], self.bits, d) - self.levels
        norms = message.parts["scales"].to(out.dtype).repeat_interleave(b)[:d]
        out.add_(codes.to(out.dtype) * norms, alpha=alpha / (self.levels * (1 + self.omega(d))))

    def message_bytes(self, d: int, itemsize: int = 4) -> float:
        b = max(1, min(d, self.bucket))
        return math.ceil(d * self.bits / 8) + itemsize * math.ceil(d / b)
