"""Compressors that send every coordinate in few bits: Sign and QSGD."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.compressors.base import Compressor, Message, check_count, check_flag
from packsaddle.compressors.levels import MOST_BITS, add_coded_levels, decode_levels, encode_levels, level_bytes
from packsaddle.compressors.parts import Expected, decoding, floats, octets
from packsaddle.errors import MessageError
from packsaddle.numerics.kernels import kernel
from packsaddle.numerics.seeds import Keys, Stream, keys, words

_SLAB = 1 << 18  # coordinates at a time, so that scratch memory does not grow with d
_AT_ONCE = 1 << 16  # coordinates of a bucket that one program of a GPU takes
_MOST_LEVELS = 1 << 23
_NEGLIGIBLE = 2.0**-28  # of the largest magnitude


@dataclass(frozen=True)
class Sign(Compressor):
    """The compressor C(v) = (||v||_1 / d) sign(v): one bit a coordinate and a scale (Karimireddy et al. 2019).

    ||v - C(v)||^2 = ||v||^2 - ||v||_1^2 / d, so mu = ||v||_1^2 / (d ||v||_2^2): 2/pi for a Gaussian v, 1/d at
    worst. With `per_tensor` each tensor of the model has its own scale. The sign of 0 is taken as +. Raises ValueError
    unless per_tensor is True or False.

    >>> import torch
    >>> from packsaddle import Sign
    >>> Sign()(torch.tensor([1.0, -3.0, 2.0, 0.0]))
    tensor([ 1.5000, -1.5000,  1.5000,  1.5000])
    >>> Sign().message_bytes(8000)
    1004
    """

    fixed_size: ClassVar[bool] = True
    per_tensor: bool = False  # a scale for each tensor
    sizes: tuple[int, ...] = field(default=(), metadata={"internal": True})  # of the tensors in v, from `for_tensors`

    def __post_init__(self) -> None:
        check_flag("per_tensor of Sign", self.per_tensor)

    def mu(self, d: int) -> float:
        return 1 / max([1, *self._sizes(d)])

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "Sign":
        return replace(self, sizes=tuple(s.numel() for s in shapes)) if self.per_tensor else self

    def restrict(self, part: int, d: int) -> "Sign":
        # A chunk cuts tensors apart: one scale for it.
        return self if part == d else replace(self, sizes=())

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        scales = torch.stack([_mean_magnitude(t) for t in torch.split(v, self._sizes(len(v)))])
        loop = kernel("pack_signs", v)
        signs = loop(v) if loop else wire.pack_bits(v >= 0)
        return Message({"signs": signs, "scales": scales.to(v.dtype)})

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return {"signs": octets(math.ceil(d / 8)), "scales": floats(len(self._sizes(d)))}

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        signs, scales, first = message.parts["signs"], message.parts["scales"].to(out.dtype), 0
        for scale, tensor in zip(scales, torch.split(out, self._sizes(len(out))), strict=True):
            _add_signs(signs, first, alpha * scale, tensor)
            first += len(tensor)

    def _sizes(self, d: int) -> list[int]:
        return list(self.sizes) if sum(self.sizes) == d and self.sizes else [d]


def _mean_magnitude(v: Tensor) -> Tensor:
    """Return ||v||_1 / d in double precision, where sums of 1e30s do not overflow; 0 for no coordinates."""
    if not len(v):
        return v.new_zeros((), dtype=torch.float64)
    if loop := kernel("sum_of_magnitudes", v):
        return torch.tensor(loop(v) / len(v), dtype=torch.float64)
    return v.abs().mean(dtype=torch.float64)


def _add_signs(signs: Tensor, first: int, scale: Tensor, out: Tensor) -> None:
    """Add +scale or -scale to each of out, float[n], as the bits from number `first` on say."""
    if loop := kernel("add_signs", out):
        loop(signs, first, scale, out)
        return
    for slab in torch.split(out, _SLAB):
        bits = wire.unpack_bits(signs[first // 8 :], first % 8 + len(slab))[first % 8 :]
        slab.add_(torch.where(bits, scale, -scale))
        first += len(slab)


@dataclass(frozen=True)
class QSGD(Compressor):
    """The compressor that rounds |v| / ||v|| at random to `levels` levels, with signs (Alistarh et al. 2017).

    The rounded Q(v) is unbiased with E||Q(v) - v||^2 <= omega ||v||^2, omega = min(b / s^2, sqrt(b) / s) for s
    levels and buckets of b coordinates that share a norm; so Q(v) / (1 + omega) is a mu-compressor with
    mu = 1 / (1 + omega), and that is C. A level and its sign take ceil(log2(2 s + 1)) bits, and `coded` about
    their entropy (see `compressors.levels`). Of a bucket in which no magnitude reaches 2^-28 of the vector's largest
    nothing is sent, unless the vector's end cuts it short: what is left of a message is smaller by 1 - mu, and would be
    sent again and again. Raises ValueError unless levels, at most 2^23, and bucket are positive integers and coded is
    True or False.

    >>> import torch
    >>> from packsaddle import QSGD
    >>> QSGD(levels=1)(torch.tensor([0.0, -3.0, 0.0, 4.0])).unique().numel() <= 3
    True
    >>> round(QSGD().mu(10_000), 3)
    0.236
    """

    private: ClassVar[bool] = True
    levels: int = 7  # s, of a magnitude; a coordinate takes ceil(log2(2 s + 1)) bits
    bucket: int = 512  # b, coordinates that share a norm
    coded: bool = True  # levels travel in about as many bits as their entropy, if up to 127; then sizes vary

    def __post_init__(self) -> None:
        for name in ("levels", "bucket"):
            check_count(f"{name} of QSGD", getattr(self, name))
        if self.levels > _MOST_LEVELS:
            raise ValueError(f"levels of QSGD must be at most 2^23, which float32 tells apart, got {self.levels}")
        check_flag("coded of QSGD", self.coded)

    @property
    def bits(self) -> int:
        """Bits of one coordinate that is not coded."""
        return (2 * self.levels).bit_length()

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]
        """True if levels travel in a fixed width."""
        return not self.coded or self.bits > MOST_BITS

    def omega(self, d: int) -> float:
        """Return the variance bound of the unscaled Q on d coordinates (Alistarh et al. 2017, Lemma 3.1)."""
        b = min(d, self.bucket)
        return min(b / self.levels**2, math.sqrt(b) / self.levels)

    def mu(self, d: int) -> float:
        return 1 / (1 + self.omega(d))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        key, b = keys(seed, step, Stream.ROUNDING), self._width(len(v))
        # bfloat16 has too few bits to round without bias.
        precise = _without_negligible(v.to(torch.promote_types(v.dtype, torch.float32)), b)
        on_cpu = v.device.type == "cpu"
        if len(v) and self.bits <= 8 and (on_cpu or b <= _AT_ONCE) and (loop := kernel("pack_levels", precise)):
            packed, norms = loop(precise, self.levels, self.bits, b, key)
            return self._message(packed, norms, len(v))
        packed, norms = [], []
        size = _slab(b)
        for start, slab in zip(range(0, max(1, len(v)), size), torch.split(precise, size), strict=True):
            buckets = torch.nn.functional.pad(slab, (0, -len(slab) % b)).view(-1, b)
            codes, scales = self._codes(buckets, start, key)
            packed.append(wire.pack(codes.view(-1)[: len(slab)], self.bits))
            norms.append(scales)
        return self._message(torch.cat(packed), torch.cat(norms), len(v))

    def _message(self, packed: Tensor, norms: Tensor, d: int) -> Message:
        if self.fixed_size:
            return Message({"levels": packed, "scales": norms})
        if (some := self._not_zero(norms, d)) is not None:  # levels of the others are not sent
            packed, d = some.of(packed, self._width(d) * self.bits // 8), some.coordinates
        return Message({"levels": encode_levels(packed, d, self.levels, self.bits), "scales": norms})

    def _codes(self, buckets: Tensor, first: int, key: Keys) -> tuple[Tensor, Tensor]:
        """Return the codes, int64[n, b], and norms, float[n], of buckets whose first coordinate is number `first`."""
        largest = buckets.abs().amax(1, keepdim=True)
        # In units of the largest magnitude neither 1e30 overflows nor a denormal loses its bits.
        unit = torch.where(largest > 0, buckets / largest, buckets)
        norms = unit.double().square().sum(1, keepdim=True).sqrt().to(unit.dtype)
        counters = torch.arange(first, first + buckets.numel(), device=buckets.device).to(torch.int32)
        chance = ((words(counters, key) >> 8) & 0xFFFFFF).to(unit.dtype).mul_(2.0**-24).view(unit.shape)
        level = (unit.abs() / norms.clamp_min(1) * self.levels).add_(chance).floor_().clamp_(max=self.levels)
        codes = torch.where(buckets < 0, -level, level).nan_to_num_(0.0).add_(self.levels)
        return codes.to(torch.int64), (norms * largest).squeeze(1)

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        levels = octets(math.ceil(d * self.bits / 8)) if self.fixed_size else level_bytes(d, self.bits)
        norms = floats(math.ceil(d / self._width(d)), torch.float32, torch.float64)
        return {"levels": levels, "scales": norms}

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        packed, norms = message.parts["levels"], message.parts["scales"]
        scale = alpha / (self.levels * (1 + self.omega(len(out))))
        some = None if self.fixed_size else self._not_zero(norms, len(out))
        with decoding(self):
            if some is None:
                self._add(packed, norms, self._width(len(out)), out, scale)
                return
            found = out.new_zeros(some.coordinates)
            self._add(packed, norms[some.index], some.width, found, scale)
        some.add(found, out)

    def _add(self, packed: Tensor, norms: Tensor, b: int, out: Tensor, scale: float) -> None:
        """Add scale * level * norm to out, float[n]; each bucket of b coordinates has a norm."""
        # Compiled loops decode and add in one pass; without one, coded levels are first brought to a fixed width.
        if not self.fixed_size:
            if add_coded_levels(packed, self.levels, b, norms, out, scale):
                return
            packed = decode_levels(packed, len(out), self.levels, self.bits)
        if self.bits <= 8 and (loop := kernel("add_levels", out, norms)):
            if not loop(packed, self.levels, self.bits, b, norms, out, scale):
                raise MessageError("levels", f"codes of at most {2 * self.levels}", "a larger one")
            return
        # In torch, by slabs that end at a byte and at a bucket.
        size = _slab(b)
        pieces = torch.split(packed, size * self.bits // 8), torch.split(norms, size // b)
        for slab, codes, scales in zip(torch.split(out, size), *pieces, strict=True):
            found = wire.unpack(codes, self.bits, len(slab))
            if len(found) and int(found.max()) > 2 * self.levels:
                raise MessageError("levels", f"codes of at most {2 * self.levels}", int(found.max()))
            levels = (found - self.levels).to(scales.dtype)
            slab.add_(levels.mul_(scale) * scales.repeat_interleave(b)[: len(slab)])  # in this order: no overflow

    def _not_zero(self, norms: Tensor, d: int) -> "_Buckets | None":
        """The buckets of which a norm is not 0; None if they are most, or codes do not end at bytes there."""
        b = self._width(d)
        if b * self.bits % 8:
            return None
        index = norms.nonzero().squeeze(1)
        return None if 8 * len(index) > 7 * len(norms) else _Buckets(index, b, d)

    def _width(self, d: int) -> int:
        """Coordinates of a bucket."""
        return max(1, min(d, self.bucket))


@dataclass(frozen=True)
class _Buckets:
    """Buckets of `width` coordinates of a vector of d, by number, int64[n], increasing; the last may be short."""

    index: Tensor
    width: int
    d: int

    @cached_property
    def _cut(self) -> int:
        """The number of coordinates that the last bucket lacks, if it is one of these."""
        last = (self.d - 1) // self.width
        return -self.d % self.width if len(self.index) and int(self.index[-1]) == last else 0

    @property
    def coordinates(self) -> int:
        """The number of their coordinates."""
        return len(self.index) * self.width - self._cut

    def of(self, packed: Tensor, size: int) -> Tensor:
        """Return their part of what has `size` bytes for each bucket, uint8[...]."""
        missing = -len(packed) % size
        padded = torch.nn.functional.pad(packed, (0, missing)).view(-1, size)[self.index].view(-1)
        return padded[: len(padded) - missing] if self._cut else padded

    def add(self, found: Tensor, out: Tensor) -> None:
        """Add float[coordinates] to their coordinates of out, float[d]."""
        whole = out[: self.d // self.width * self.width].view(-1, self.width)
        some = self.index[:-1] if self._cut else self.index
        whole[some] += found[: len(some) * self.width].view(-1, self.width)
        if self._cut:
            out[len(whole) * self.width :] += found[len(some) * self.width :]


def _without_negligible(v: Tensor, bucket: int) -> Tensor:
    """Return v, float[d], with zeros for the buckets that are negligible compared with its largest magnitude."""
    if len(v) <= bucket:
        return v
    edge = len(v) // bucket * bucket
    buckets, rest = v[:edge].view(-1, bucket), v[edge:]
    largest = torch.maximum(buckets.amax(1), -buckets.amin(1))
    most = torch.cat([largest, rest.abs()]).amax()
    some = (largest > 0) & (largest < _NEGLIGIBLE * most.where(most.isfinite(), torch.zeros_like(most)))
    if v.device.type == "cpu" and not some.any():
        return v
    return torch.cat([buckets.masked_fill(some[:, None], 0.0).view(-1), rest])


def _slab(bucket: int) -> int:
    """Coordinates at a time: whole buckets, whose codes end at a byte."""
    return 8 * bucket * max(1, _SLAB // (8 * bucket))
