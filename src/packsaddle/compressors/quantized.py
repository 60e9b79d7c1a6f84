"""Compressors that quantize every coordinate to a few bits: Sign, Rounded and QSGD."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from packsaddle.compressors import wire
from packsaddle.compressors.base import Compressor, Message, Summary, check_flag
from packsaddle.compressors.levels import (
    MOST_BITS,
    decode_levels,
    encode_levels,
    histogram,
    level_bytes,
    unpack_levels,
)
from packsaddle.compressors.parts import Expected, check_padding, floats, octets
from packsaddle.compressors.values import (
    ValueFormat,
    add_values,
    check_format,
    check_values,
    encode_values,
    value_parts,
    value_retention,
)
from packsaddle.errors import check_integers
from packsaddle.numerics.devices import indices_where, read, wide, widened
from packsaddle.numerics.kernels import kernel
from packsaddle.numerics.seeds import Keys, Stream, keys, words

_SLAB = 1 << 18  # coordinates processed at a time, to bound scratch memory
_MOST_LEVELS = 1 << 23  # largest valid `levels`: float32 represents all integers up to this number exactly
_NEGLIGIBLE = 2.0**-28  # buckets whose magnitudes are below this fraction of the vector's largest are sent as 0


@dataclass(frozen=True)
class Sign(Compressor):
    """The compressor C(v) = (||v||_1 / d) sign(v): one bit per coordinate and a scale (Karimireddy et al. 2019).

    ||v - C(v)||^2 = ||v||^2 - ||v||_1^2 / d, so mu = ||v||_1^2 / (d ||v||_2^2): 2/pi for a Gaussian v, 1/d in the
    worst case. With `per_tensor` each tensor of the model has its own scale. sign(0) is +1. Raises ValueError unless
    per_tensor is True or False.

    >>> import torch
    >>> from packsaddle import Sign
    >>> Sign()(torch.tensor([1.0, -3.0, 2.0, 0.0]))
    tensor([ 1.5000, -1.5000,  1.5000,  1.5000])
    >>> Sign().message_bytes(8000)
    1004
    """

    fixed_size: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary("||v||_1^2 / (d ||v||_2^2)", "a bit for each coordinate, and a scale")
    per_tensor: bool = False  # use a scale per tensor instead of one for the vector
    sizes: tuple[int, ...] = field(default=(), metadata={"internal": True})  # tensor lengths, from `for_tensors`

    def __post_init__(self) -> None:
        check_flag("per_tensor of Sign", self.per_tensor)

    def mu(self, d: int) -> float:
        return 1 / max([1, *self._sizes(d)])

    def for_tensors(self, shapes: Sequence[torch.Size]) -> "Sign":
        return replace(self, sizes=tuple(s.numel() for s in shapes)) if self.per_tensor else self

    def restrict(self, start: int, stop: int, d: int) -> "Sign":
        if not self.per_tensor:
            return self
        sizes = self._sizes(d)
        parts = (min(stop, end) - max(start, end - n) for n, end in zip(sizes, accumulate(sizes), strict=True))
        return replace(self, sizes=tuple(n for n in parts if n > 0))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        loop = kernel("pack_signs", v)
        signs = loop(v) if loop else wire.pack_bits(v >= 0)
        return Message({"signs": signs, "scales": _mean_magnitudes(v, self._sizes(len(v))).to(v.dtype)})

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return {"signs": octets(math.ceil(d / 8)), "scales": floats(len(self._sizes(d)))}

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> None:
        check_padding("signs", parts["signs"], d)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        signs, sizes, first = message.parts["signs"], self._sizes(len(out)), 0
        scales = alpha * message.parts["scales"].to(out.dtype)
        if loop := kernel("add_signs", out):
            loop(signs, sizes, scales, out)
            return
        for scale, tensor in zip(scales, torch.split(out, sizes), strict=True):
            for slab in torch.split(tensor, _SLAB):
                bits = wire.unpack_bits(signs[first // 8 :], first % 8 + len(slab))[first % 8 :]
                slab.add_(torch.where(bits, scale, -scale))
                first += len(slab)

    def _sizes(self, d: int) -> list[int]:
        return list(self.sizes) if sum(self.sizes) == d and self.sizes else [d]


def _mean_magnitudes(v: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean magnitude of each run of consecutive coordinates of v, as float64[runs]. The mean of an empty run
    is 0. `sizes` contains the length of each run. Sums are in float64, or in float32 on MPS, which has no float64."""
    if loop := kernel("sums_of_magnitudes", v):
        means: Tensor = loop(v, sizes) / torch.tensor(sizes).clamp_min_(1)
        return means
    return torch.stack([t.abs().sum(dtype=wide(v.device)) / max(1, len(t)) for t in torch.split(v, sizes)])


@dataclass(frozen=True)
class Rounded(Compressor):
    """A compressor that sends every coordinate, rounded to nearest in a format of few bits (`compressors.values`).

    The default, "int2", sends two bits of each coordinate: its sign, and whether its magnitude exceeds the mean
    magnitude of its block of 256 coordinates. Each block has two levels: the mean of the magnitudes that exceed this
    mean, and the mean of the magnitudes that do not. With the levels, a coordinate takes 2.1 bits. For a Gaussian
    vector, 12% of ||v||^2 remains for the error memory; with `Sign`, 36% remains. Raises ValueError for an unknown
    format.

    >>> import torch
    >>> from packsaddle import Rounded
    >>> Rounded()(torch.tensor([1.0, -3.0, 5.0, 1.0]))
    tensor([ 1., -4.,  4.,  1.])
    >>> Rounded().message_bytes(8000)
    2133
    """

    fixed_size: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary(
        "4/256 or better, by format", "a few bits for each coordinate; scales or levels of each 256"
    )
    values: ValueFormat = "int2"  # format of the coordinates

    def __post_init__(self) -> None:
        check_format("Rounded", self.values)

    def mu(self, d: int) -> float:
        """Return a lower bound on the contraction mu for every vector of d coordinates: the fraction of ||v||^2 that
        the format retains (`value_retention`)."""
        return value_retention(self.values)

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        return Message(encode_values(v, self.values))

    def expected_parts(self, d: int) -> Mapping[str, Expected]:
        return value_parts(d, self.values)

    def context_of(self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int) -> None:
        check_values(parts, self.values)

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        add_values(message.parts, self.values, out, alpha)


@dataclass(frozen=True)
class QSGD(Compressor):
    """A compressor that rounds |v| / ||v|| stochastically to multiples of 1 / `levels` (Alistarh et al. 2017).

    The rounded vector Q(v) is unbiased with E||Q(v) - v||^2 <= omega ||v||^2, omega = min(b / s^2, sqrt(b) / s) for s
    levels and buckets of b coordinates with one norm each. C(v) = Q(v) / (1 + omega) is a mu-compressor with
    mu = 1 / (1 + omega). A level with its sign takes ceil(log2(2 s + 1)) bits, or about its entropy if `coded` (see
    `compressors.levels`). A full bucket whose magnitudes are all below 2^-28 times the vector's largest magnitude is
    sent as 0. The error memory would otherwise send ever smaller residuals of this bucket at every step until they
    underflow.

    Raises ValueError unless levels and bucket are positive integers, levels is at most 2^23, and coded is True or
    False.

    >>> import torch
    >>> from packsaddle import QSGD
    >>> QSGD(levels=1)(torch.tensor([0.0, -3.0, 0.0, 4.0])).unique().numel() <= 3
    True
    >>> round(QSGD().mu(10_000), 3)
    0.236
    """

    private: ClassVar[bool] = True
    summary: ClassVar[Summary] = Summary(
        "1 / (1 + min(b/s^2, sqrt(b)/s))",
        "levels, in about their entropy; a norm for each bucket",
        ({}, {"levels": 127}),
    )
    levels: int = 7  # s, number of nonzero levels of a magnitude; a coordinate takes ceil(log2(2 s + 1)) bits
    bucket: int = 512  # b, coordinates per norm
    coded: bool = True  # entropy-code the levels, if levels is at most 127; message sizes then vary

    def __post_init__(self) -> None:
        check_integers(1, **{f"{name} of QSGD": getattr(self, name) for name in ("levels", "bucket")})
        if self.levels > _MOST_LEVELS:
            raise ValueError(f"levels of QSGD must be at most 2^23, which float32 tells apart, got {self.levels}")
        check_flag("coded of QSGD", self.coded)

    @property
    def bits(self) -> int:
        """Bits per coordinate without entropy coding."""
        return (2 * self.levels).bit_length()

    @property
    def fixed_size(self) -> bool:  # type: ignore[override]
        """True if levels are sent in a fixed number of bits each, not entropy-coded."""
        return not self.coded or self.bits > MOST_BITS

    def omega(self, d: int) -> float:
        """Return omega for vectors v of d coordinates, where E||Q(v) - v||^2 <= omega ||v||^2 for the rounded vector
        Q(v) (Alistarh et al. 2017, Lemma 3.1)."""
        b = min(d, self.bucket)
        return min(b / self.levels**2, math.sqrt(b) / self.levels)

    def mu(self, d: int) -> float:
        return 1 / (1 + self.omega(d))

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        key, b = keys(seed, step, Stream.ROUNDING), self._width(len(v))
        # bfloat16 has too few bits for unbiased rounding.
        precise = _without_negligible(v.to(torch.promote_types(v.dtype, torch.float32)), b)
        # Pack each level in the fixed number of bits, or in one byte if the levels will be entropy-coded.
        width = self.bits if self.fixed_size else 8
        if len(v) and width <= 8 and (loop := kernel("pack_levels", precise)):
            levels, norms = loop(precise, self.levels, width, b, key)
        else:
            size, packed, scales = _slab(b), [], []
            for start, slab in zip(range(0, max(1, len(v)), size), torch.split(precise, size), strict=True):
                buckets = torch.nn.functional.pad(slab, (0, -len(slab) % b)).view(-1, b)
                codes, of_buckets = self._codes(buckets, start, key)
                packed.append(wire.pack(codes.view(-1)[: len(slab)], width))
                scales.append(of_buckets)
            levels, norms = torch.cat(packed), torch.cat(scales)
        if self.fixed_size:
            return Message({"levels": levels, "scales": norms})
        # Skip buckets whose norm is 0. On a GPU the host waits once here. If buckets are skipped, it waits again for
        # the histogram of the remaining levels.
        nonzero, *numbers = read(norms.count_nonzero(), *([] if v.device.type == "cpu" else [histogram(levels)]))
        some = self._not_zero(norms, len(v), nonzero)
        counts = torch.tensor(numbers[0]) if numbers and some is None else None
        codes = levels if some is None else some.of(levels)
        coded = encode_levels(codes, self.levels, self.bits, counts)
        return Message({"levels": coded, "scales": norms}, (codes, some))

    def _codes(self, buckets: Tensor, first: int, key: Keys) -> tuple[Tensor, Tensor]:
        """Quantize consecutive buckets of b coordinates each. `buckets` is float[n, b], and `first` is the index in the
        vector of the first coordinate. The random numbers follow from `key`. Returns two tensors: the sum of the level
        and `self.levels` for each coordinate, int64[n, b], and the norm of each bucket, float[n]."""
        largest = buckets.abs().amax(1, keepdim=True)
        # Dividing by the largest magnitude first avoids overflow and loss of denormals.
        unit = torch.where(largest > 0, buckets / largest, buckets)
        norms = widened(unit).square().sum(1, keepdim=True).sqrt().to(unit.dtype)
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
        norms, d = message.parts["scales"], len(out)
        scale = alpha / (self.levels * (1 + self.omega(d)))
        codes, some = message.context or (self._unpacked(message.parts, d), None)
        if some is None:
            self._add(codes, norms, self._width(d), out, scale)
            return
        found = out.new_zeros(some.coordinates)
        self._add(codes, norms[some.index], some.width, found, scale)
        some.add(found, out)

    def context_of(
        self, parts: Mapping[str, Tensor], d: int, *, seed: int, step: int
    ) -> "tuple[Tensor, _Buckets | None] | None":
        # The code of a coordinate is the sum of its level and `self.levels`. Return the codes of the coordinates in the
        # buckets that were sent, uint8[n] or int32[n], and these buckets (None: all buckets were sent). On a GPU, codes
        # with a fixed number of bits stay packed until they are added, to save memory; there is no check of them.
        coded = parts["levels"]
        if self.fixed_size:
            return (self._unpacked(parts, d), None) if coded.device.type == "cpu" else None
        head, nonzero = read(coded[:2], parts["scales"].count_nonzero())
        some = self._not_zero(parts["scales"], d, nonzero)
        n = d if some is None else some.coordinates
        return decode_levels(coded, n, self.levels, self.bits, head), some

    def _unpacked(self, parts: Mapping[str, Tensor], d: int) -> Tensor:
        return unpack_levels(parts["levels"], d, self.levels, self.bits)

    def _add(self, codes: Tensor, norms: Tensor, b: int, out: Tensor, scale: float) -> None:
        """Add scale * level * norm to each coordinate of out, float[n], in place. `codes` contains the sum of the level
        and `self.levels` for each coordinate. `norms` contains the norm of each bucket of b coordinates."""
        if codes.dtype == torch.uint8 and (loop := kernel("add_levels", out, norms)):
            loop(codes, self.levels, b, norms, out, scale)
            return
        size = _slab(b)
        pieces = (torch.split(out, size), torch.split(codes, size), torch.split(norms, size // b))
        for slab, c, scales in zip(*pieces, strict=True):
            levels = c.to(scales.dtype).sub_(self.levels)
            slab.add_(levels.mul_(scale) * scales.repeat_interleave(b)[: len(slab)])  # this order avoids overflow

    def _not_zero(self, norms: Tensor, d: int, nonzero: int) -> "_Buckets | None":
        """Return the buckets, i.e. runs of coordinates with one norm each, whose norm is not 0. Only their levels are
        entropy-coded and sent. `nonzero` is the number of these buckets. Returns None, so that all buckets are sent, if
        more than 7/8 of the norms are not 0, or if buckets do not end at byte boundaries."""
        b = self._width(d)
        if b * self.bits % 8 or 8 * nonzero > 7 * len(norms):
            return None
        return _Buckets(indices_where(norms != 0, nonzero), b, d)

    def _width(self, d: int) -> int:
        return max(1, min(d, self.bucket))


@dataclass(frozen=True)
class _Buckets:
    """A subset of the buckets of a vector of d coordinates, i.e. runs of coordinates with one norm each. The vector's
    last bucket may be shorter than all others."""

    index: Tensor  # bucket numbers, int64[n], increasing
    width: int  # coordinates of a full bucket
    d: int

    @cached_property
    def _cut(self) -> int:
        """The number of coordinates by which the vector's last bucket is shorter than a full bucket, or 0 if the last
        bucket is not in this subset."""
        last = (self.d - 1) // self.width
        return -self.d % self.width if len(self.index) and int(self.index[-1]) == last else 0

    @property
    def coordinates(self) -> int:
        return len(self.index) * self.width - self._cut

    def of(self, codes: Tensor) -> Tensor:
        """Return the codes of the coordinates in these buckets. `codes`, uint8[d], contains a code for each coordinate
        of the vector."""
        buckets = torch.nn.functional.pad(codes, (0, -self.d % self.width)).view(-1, self.width)
        return buckets[self.index].view(-1)[: self.coordinates]

    def add(self, found: Tensor, out: Tensor) -> None:
        """Add `found`, float[n], to out, float[d], in place. `found` contains a number for each of the n coordinates in
        these buckets."""
        whole = out[: self.d // self.width * self.width].view(-1, self.width)
        some = self.index[:-1] if self._cut else self.index
        whole[some] += found[: len(some) * self.width].view(-1, self.width)
        if self._cut:
            out[len(whole) * self.width :] += found[len(some) * self.width :]


def _without_negligible(v: Tensor, bucket: int) -> Tensor:
    """Return v, float[d], with zeros in each full run of `bucket` coordinates whose magnitudes are all below 2^-28
    times the largest magnitude in v."""
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
    """Return the number of coordinates to process at a time. It is a multiple of 8 buckets of `bucket` coordinates
    each, so that packed codes end at a byte boundary."""
    return 8 * bucket * max(1, _SLAB // (8 * bucket))
