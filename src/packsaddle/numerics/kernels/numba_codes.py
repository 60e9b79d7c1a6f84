"""Compiled loops that pack and unpack signs, quantizer levels, numbers of few bits, and gaps between indices."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import (
    MAGNITUDE,
    Array,
    bits_of,
    check_room,
    compiled_loop,
    compiled_sum,
    in_parts,
    scalar,
)
from packsaddle.numerics.kernels.numba_random import word


def pack_signs(v: Tensor) -> Tensor:
    """Pack the signs of v, float[d], into uint8[ceil(d / 8)]: bit 1 where v >= 0, most significant bit first."""
    out = torch.empty(-(-len(v) // 8), dtype=torch.uint8)
    a, o = v.numpy(), out.numpy()
    in_parts(len(v), 8, lambda start, stop: _pack_signs(a[start:stop], o[start // 8 :]))
    return out


@compiled_loop
def _pack_signs(v: Array, out: Array) -> None:
    full = len(v) // 8
    for j in range(full):
        byte = np.uint8(0)
        for i in range(8):
            byte = np.uint8((byte << 1) | np.uint8(v[8 * j + i] >= 0))
        out[j] = byte
    if 8 * full < len(v):
        byte = np.uint8(0)
        for i in range(8 * full, len(v)):
            byte |= np.uint8(np.uint8(v[i] >= 0) << (7 - i % 8))
        out[full] = byte


def sum_of_magnitudes(v: Tensor) -> float:
    """Return ||v||_1, summed in float64."""
    a = v.numpy()
    return float(sum(in_parts(len(v), 1, lambda start, stop: _sum_of_magnitudes(a[start:stop]))))


@compiled_sum
def _sum_of_magnitudes(v: Array) -> float:
    s = 0.0
    for i in range(len(v)):
        s += abs(np.float64(v[i]))
    return s


def add_signs(packed: Tensor, first: int, scale: Tensor, out: Tensor) -> None:
    """Add +scale or -scale, float[], to element i of out, float[n], where bit first + i of `packed` is 1 or 0."""
    check_room("signs", packed, -(-(first + len(out)) // 8))
    p, o = packed.numpy(), out.numpy()
    s = scalar(float(scale), o)
    in_parts(len(out), 8, lambda start, stop: _add_signs(p, first + start, s, o[start:stop]))


@compiled_loop
def _add_signs(packed: Array, first: int, scale: float, out: Array) -> None:
    head = min(len(out), -first % 8)
    full = (len(out) - head) // 8
    whole, body = packed[(first + head) >> 3 :][:full], out[head : head + 8 * full]
    for j in range(len(whole)):  # over slices: without negative indices numba vectorizes
        for i in range(8):
            body[8 * j + i] += scale if (whole[j] >> (7 - i)) & 1 else -scale
    for i in range(len(out)):
        if i < head or i >= head + 8 * full:
            out[i] += scale if (packed[(first + i) >> 3] >> (7 - ((first + i) & 7))) & 1 else -scale


def pack_levels(v: Tensor, levels: int, bits: int, bucket: int, keys: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Quantize v, float[d], as QSGD: return packed codes, uint8[ceil(d bits / 8)], and a norm per bucket, float[...].
    `bits` is at most 8. See `compressors.quantized`."""
    d = len(v)
    out = torch.empty(-(-d * bits // 8), dtype=torch.uint8)
    norms = torch.empty(-(-d // bucket), dtype=v.dtype)
    a, b, o, s = v.numpy(), bits_of(v), out.numpy(), norms.numpy()
    mask = b.dtype.type(MAGNITUDE[v.dtype])
    shape, key = (levels, bits, bucket), (np.uint32(keys[0]), np.uint32(keys[1]))

    def part(start: int, stop: int) -> None:
        packed, of_buckets = o[start * bits // 8 : -(-stop * bits // 8)], s[start // bucket : -(-stop // bucket)]
        _pack_levels(a[start:stop], b[start:stop], mask, shape, key, start, packed, of_buckets)

    in_parts(d, 8 * bucket, part)
    return out, norms


@compiled_loop
def _pack_levels(
    v: Array, bits_of_v: Array, mask: int, shape: Any, key: Any, offset: int, out: Array, norms: Array
) -> None:
    levels, bits, bucket = shape
    # Loops run over slices: numba then excludes negative indices, and vectorizes them.
    unit, codes = np.empty(bucket, v.dtype), np.zeros(8 * bucket, np.uint8)  # eight buckets end at a byte boundary
    for group in range(0, len(v), 8 * bucket):
        held = v[group : group + 8 * bucket]
        for start in range(0, len(held), bucket):
            x, c = held[start : start + bucket], codes[start : start + bucket]
            x_bits, place = bits_of_v[group + start : group + start + len(x)], offset + group + start
            norm = _levels_of(x, x_bits, mask, unit[: len(x)], v.dtype.type(levels), key, np.uint32(place), c)
            norms[(group + start) // bucket] = norm
        codes[len(held) :] = 0
        pack_codes(codes[: -(-len(held) // 8) * 8], bits, out[group * bits // 8 :])


@compiled_loop
def _levels_of(x: Array, bits: Array, mask: int, unit: Array, top: float, key: Any, place: Any, codes: Array) -> Any:
    """Write the codes of one bucket x, which begins at index `place` of the vector; return its norm."""
    first, second = key
    zero, one = x.dtype.type(0), x.dtype.type(1)
    most = bits.dtype.type(0)
    for i in range(len(x)):  # as integers: NaN is ordered, and the loop vectorizes
        most = max(most, bits[i] & mask)
    scratch = np.empty(1, bits.dtype)
    scratch[0] = most
    largest = scratch.view(x.dtype)[0]
    # A non-finite bucket gets levels 0 and norm NaN, and so decodes to NaN.
    if not np.isfinite(largest):
        codes[:] = np.uint8(top)
        return x.dtype.type(np.nan)
    # Divide by the largest magnitude, so that squares neither overflow nor underflow.
    for i in range(len(x)):
        unit[i] = abs(x[i]) / (largest if largest > zero else one)
    norm = x.dtype.type(np.sqrt(_sum_of_squares(unit)))
    divisor = max(norm, one)
    # level = floor(s |x| / ||x|| + u), u uniform in [0, 1): unbiased.
    for i in range(len(x)):
        random = word(np.uint32(place + np.uint32(i)), first, second) >> np.uint32(8)
        chance = x.dtype.type(np.int32(random)) * x.dtype.type(2.0**-24)
        level = min(top, np.floor(unit[i] / divisor * top + chance))
        codes[i] = np.uint8(np.int32((-level if x[i] < zero else level) + top))
    return norm * largest


@compiled_sum
def _sum_of_squares(v: Array) -> float:
    s = 0.0
    for i in range(len(v)):
        s += np.float64(v[i]) * np.float64(v[i])
    return s


@compiled_loop
def pack_codes(codes: Array, bits: int, out: Array) -> None:
    """Pack `codes`, uint8[n], n a multiple of 8, in `bits` bits each, at most 8, into `out`."""
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(8):
            word |= np.uint64(codes[8 * k + j]) << np.uint64(bits * (7 - j))
        for j in range(min(bits, len(out) - k * bits)):
            out[k * bits + j] = np.uint8((word >> np.uint64(8 * (bits - 1 - j))) & np.uint64(255))


def unpack_levels(packed: Tensor, d: int, levels: int, bits: int) -> Tensor | None:
    """Unpack the d codes of `pack_levels` to uint8[d]; return None if a code is above 2 * levels."""
    check_room("packed levels", packed, -(-d * bits // 8))
    codes = torch.empty(d, dtype=torch.uint8)
    p, c = packed.numpy(), codes.numpy()
    largest = in_parts(d, 8, lambda start, stop: _unpack_levels(p[start * bits // 8 :], bits, c[start:stop]))
    return codes if max(largest) <= 2 * levels else None


@compiled_loop
def _unpack_levels(packed: Array, bits: int, codes: Array) -> Any:
    """Unpack `packed` into `codes`, uint8[n], and return the largest code."""
    full, largest, last = len(codes) // 8 * 8, np.uint8(0), np.empty(8, np.uint8)
    unpack_codes(packed, bits, codes[:full])
    unpack_codes(packed[full * bits // 8 :], bits, last)
    codes[full:] = last[: len(codes) - full]
    for i in range(len(codes)):
        largest = max(largest, codes[i])
    return largest


def add_levels(packed: Tensor, levels: int, bits: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> None:
    """Add alpha * (code - levels) * norm to out, float[d], for codes of `bits` bits and the norms of `pack_levels`."""
    check_room("packed levels", packed, -(-len(out) * bits // 8))
    check_room("norms", norms, -(-len(out) // bucket))
    p, s, o = packed.numpy(), norms.numpy(), out.numpy()
    scale = scalar(alpha, o)

    def part(start: int, stop: int) -> None:
        _add_levels(p[start * bits // 8 :], levels, bits, bucket, s[start // bucket :], o[start:stop], scale)

    in_parts(len(out), 8 * bucket, part)


@compiled_loop
def _add_levels(packed: Array, levels: int, bits: int, bucket: int, norms: Array, out: Array, alpha: float) -> None:
    scratch = np.empty(8 * bucket, np.uint8)
    for group in range(0, len(out), 8 * bucket):
        held = out[group : group + 8 * bucket]
        codes = packed[group : group + len(held)] if bits == 8 else scratch
        if bits < 8:
            unpack_codes(packed[group * bits // 8 :], bits, codes[: -(-len(held) // 8) * 8])
        for start in range(0, len(held), bucket):
            x, c, norm = held[start : start + bucket], codes[start : start + bucket], norms[(group + start) // bucket]
            for i in range(len(x)):
                x[i] += (alpha * out.dtype.type(np.int32(c[i]) - np.int32(levels))) * norm  # in this order: no overflow


@compiled_loop
def unpack_codes(packed: Array, bits: int, codes: Array) -> None:
    """Unpack n codes of `bits` bits each, at most 8, from `packed` into `codes`, uint8[n], n a multiple of 8."""
    mask = np.uint64((1 << bits) - 1)
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(bits):  # the last word may be incomplete
            place = k * bits + j
            word = (word << np.uint64(8)) | (np.uint64(packed[place]) if place < len(packed) else np.uint64(0))
        for j in range(8):
            codes[8 * k + j] = np.uint8((word >> np.uint64(bits * (7 - j))) & mask)


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Pack numbers below 2^width, int64[n], into uint8[ceil(n width / 8)], high bit first; width at most 56."""
    out = torch.empty(-(-len(numbers) * width // 8), dtype=torch.uint8)
    _pack_numbers(numbers.numpy(), width, out.numpy())
    return out


@compiled_loop
def _pack_numbers(numbers: Array, width: int, out: Array) -> None:
    accumulator, held, place = np.uint64(0), 0, 0
    for i in range(len(numbers)):
        accumulator = (accumulator << np.uint64(width)) | np.uint64(numbers[i])
        held += width
        while held >= 8:
            held -= 8
            out[place] = np.uint8((accumulator >> np.uint64(held)) & np.uint64(255))
            place += 1
    if held:
        out[place] = np.uint8((accumulator << np.uint64(8 - held)) & np.uint64(255))


def pack_gaps(index: Tensor, kept: int, size: int, b: int) -> Tensor:
    """Encode the gaps between indices, int64[k], `kept` per chunk of `size`, as uint8[...]. See `wire.pack_gaps`."""
    k = len(index)
    unary = torch.zeros((k + (-(-k // kept) * size >> b)) // 8 + 1, dtype=torch.uint8)
    remainders = torch.empty(-(-k * b // 8), dtype=torch.uint8)
    used = _pack_gaps(index.numpy(), kept, size, b, unary.numpy(), remainders.numpy())
    return torch.cat([unary[: -(-used // 8)], remainders])


@compiled_loop
def _pack_gaps(index: Array, kept: int, size: int, b: int, unary: Array, remainders: Array) -> Any:
    mask, accumulator = np.uint64((1 << b) - 1), np.uint64(0)
    held, place, last = 0, 0, np.int64(-1)
    bit: Any = 0
    for i in range(len(index)):
        if i % kept == 0:
            last = np.int64(i // kept) * size - 1
        # Write the gap's quotient by 2^b in unary, as zeros and a one, and its remainder in b bits.
        gap = np.uint64(index[i] - last - 1)
        last = index[i]
        bit += np.int64(gap >> np.uint64(b))
        unary[bit >> 3] |= np.uint8(128 >> (bit & 7))
        bit += 1
        accumulator = (accumulator << np.uint64(b)) | (gap & mask)
        held += b
        while held >= 8:
            held -= 8
            remainders[place] = np.uint8((accumulator >> np.uint64(held)) & np.uint64(255))
            place += 1
    if held:
        remainders[place] = np.uint8((accumulator << np.uint64(8 - held)) & np.uint64(255))
    return bit


def unpack_gaps(packed: Tensor, k: int, kept: int, size: int, b: int) -> Tensor | None:
    """Invert `pack_gaps`: return the indices, int64[k]; None unless exactly k gaps are coded and all indices are in
    their chunks. The end of the last chunk is not checked."""
    out = torch.empty(k, dtype=torch.int64)
    split = len(packed) - -(-k * b // 8)
    if split < 0:
        return None
    complete = _unpack_gaps(packed.numpy()[:split], packed.numpy()[split:], kept, size, b, out.numpy())
    return out if complete else None


@compiled_loop
def _unpack_gaps(unary: Array, remainders: Array, kept: int, size: int, b: int, out: Array) -> bool:
    ends, mask, accumulator = np.empty(9, np.int64), np.uint64((1 << b) - 1), np.uint64(0)
    held, place, m, before, last = 0, 0, 0, np.int64(-1), np.int64(-1)
    for j in range(len(unary)):
        if m == len(out):
            return False
        # Find the positions of the ones in this byte; each one ends a quotient.
        byte = unary[j]
        found: Any = 0
        for i in range(8):  # branch-free: positions of zeros are overwritten
            ends[found] = 8 * j + i
            found += np.int64((byte >> (7 - i)) & 1)
        if found > len(out) - m:
            return False
        # Read a remainder of b bits for each quotient.
        for i in range(found):
            while held < b:
                accumulator = (accumulator << np.uint64(8)) | np.uint64(remainders[place])
                held += 8
                place += 1
            held -= b
            # The first gap of a chunk is relative to the chunk's start; the previous index must be before that start.
            if m % kept == 0:
                before_chunk = np.int64(m // kept) * size - 1
                if last > before_chunk:
                    return False
                last = before_chunk
            quotient = np.uint64(ends[i] - before - 1)
            before = ends[i]
            last += np.int64((quotient << np.uint64(b)) | ((accumulator >> np.uint64(held)) & mask)) + 1
            out[m] = last
            m += 1
    return m == len(out)


def unpack_numbers(packed: Tensor, width: int, n: int) -> Tensor:
    """Invert `pack_numbers`: return n numbers, int64[n]."""
    check_room("packed numbers", packed, -(-n * width // 8))
    out = torch.empty(n, dtype=torch.int64)
    _unpack_numbers(packed.numpy(), width, out.numpy())
    return out


@compiled_loop
def _unpack_numbers(packed: Array, width: int, out: Array) -> None:
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    accumulator, held, place = np.uint64(0), 0, 0
    for i in range(len(out)):
        while held < width:
            accumulator = (accumulator << np.uint64(8)) | np.uint64(packed[place])
            held += 8
            place += 1
        held -= width
        out[i] = np.int64((accumulator >> np.uint64(held)) & mask)
