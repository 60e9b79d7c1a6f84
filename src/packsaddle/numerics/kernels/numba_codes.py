"""Compiled loops that pack and unpack signs, QSGD's levels, numbers of few bits, and Rice codes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import (
    Array,
    bits_of,
    check_room,
    compiled_loop,
    compiled_sum,
    in_parts,
    scalar,
    sum_of_magnitudes,
)
from packsaddle.numerics.kernels.numba_random import word

_GROUP = 4096  # numbers of a Rice code processed at a time, a multiple of 8


def pack_signs(v: Tensor) -> Tensor:
    """Pack the signs of v, float[d], in one bit each, most significant bit first. A bit is 1 if the element of v is at
    least 0. Returns uint8[ceil(d / 8)]."""
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


def sums_of_magnitudes(v: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sum of the magnitudes in each run of consecutive elements of v, float[d]. The result is float64[runs].
    `sizes` contains the length of each run."""
    a, edges = v.numpy(), _edges(sizes)

    def part(start: int, stop: int) -> Array:
        sums = np.zeros(len(sizes))
        _sums_of_magnitudes(a, edges, start, stop, sums)
        return sums

    return torch.from_numpy(sum(in_parts(len(v), 1, part)))


def _edges(sizes: Sequence[int]) -> Array:
    return np.cumsum([0, *sizes], dtype=np.int64)


@compiled_loop
def _sums_of_magnitudes(v: Array, edges: Array, start: int, stop: int, sums: Array) -> None:
    for run in range(len(sums)):
        first, end = max(start, edges[run]), min(stop, edges[run + 1])
        if first < end:
            sums[run] = sum_of_magnitudes(v[first:end])


def add_signs(packed: Tensor, sizes: Sequence[int], scales: Tensor, out: Tensor) -> None:
    """Add `scale` to each element of out, float[d], whose bit in `packed` is 1, and -`scale` to all other elements, in
    place. Bits are in the order of `pack_signs`. out consists of consecutive runs: `sizes` contains the length of each
    run, and `scales`, float[runs], the `scale` of each run."""
    check_room("signs", packed, -(-len(out) // 8))
    check_room("scales", scales, len(sizes))
    p, s, o, edges = packed.numpy(), scales.numpy(), out.numpy(), _edges(sizes)
    in_parts(len(out), 8, lambda start, stop: _add_signs_of_runs(p, s, o, edges, start, stop))


@compiled_loop
def _add_signs_of_runs(packed: Array, scales: Array, out: Array, edges: Array, start: int, stop: int) -> None:
    for run in range(len(edges) - 1):
        first, end = max(start, edges[run]), min(stop, edges[run + 1])
        if first < end:
            _add_signs(packed, first, scales[run], out[first:end])


@compiled_loop
def _add_signs(packed: Array, first: int, scale: float, out: Array) -> None:
    head = min(len(out), -first % 8)
    full = (len(out) - head) // 8
    whole, body = packed[(first + head) >> 3 :][:full], out[head : head + 8 * full]
    # Loop over slices, whose indices cannot be negative, so that numba vectorizes.
    for j in range(len(whole)):
        for i in range(8):
            body[8 * j + i] += scale if (whole[j] >> (7 - i)) & 1 else -scale
    for i in range(len(out)):
        if i < head or i >= head + 8 * full:
            out[i] += scale if (packed[(first + i) >> 3] >> (7 - ((first + i) & 7))) & 1 else -scale


def pack_levels(v: Tensor, levels: int, bits: int, bucket: int, keys: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Quantize v, float[d], to integer levels from -`levels` to `levels` as QSGD does (see `compressors.quantized`).

    Returns the packed codes, uint8[ceil(d bits / 8)], and the norm of each bucket of `bucket` elements, float[buckets].
    A code is the sum of a level and `levels`, in `bits` bits, at most 8.
    """
    d = len(v)
    out = torch.empty(-(-d * bits // 8), dtype=torch.uint8)
    norms = torch.empty(-(-d // bucket), dtype=v.dtype)
    a, (b, mask), o, s = v.numpy(), bits_of(v), out.numpy(), norms.numpy()
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
    # Loop over slices, whose indices cannot be negative, so that numba vectorizes.
    # The packed codes of eight buckets end at a byte boundary.
    unit, codes = np.empty(bucket, v.dtype), np.zeros(8 * bucket, np.uint8)
    for group in range(0, len(v), 8 * bucket):
        held = v[group : group + 8 * bucket]
        for start in range(0, len(held), bucket):
            x, c = held[start : start + bucket], codes[start : start + bucket]
            x_bits, place = bits_of_v[group + start : group + start + len(x)], offset + group + start
            norm = _levels_of(x, x_bits, mask, unit[: len(x)], v.dtype.type(levels), key, np.uint32(place), c)
            norms[(group + start) // bucket] = norm
        if bits == 8:
            out[group : group + len(held)] = codes[: len(held)]
        else:
            codes[len(held) :] = 0
            pack_codes(codes[: -(-len(held) // 8) * 8], bits, out[group * bits // 8 :])


@compiled_loop
def _levels_of(x: Array, bits: Array, mask: int, unit: Array, top: float, key: Any, place: Any, codes: Array) -> Any:
    """Quantize one bucket x (coordinates with one norm), which begins at index `place` of the vector. Writes to `codes`
    the sum of the level and `top` for each coordinate. Returns the norm of x."""
    first, second = key
    zero, one = x.dtype.type(0), x.dtype.type(1)
    most = bits.dtype.type(0)
    # Compare magnitudes as integers: NaN is then the largest, and numba vectorizes the loop.
    for i in range(len(x)):
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
    # With s = `top` levels, level = floor(s |x| / ||x|| + u) is unbiased if u is uniform in [0, 1).
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
    """Pack `codes`, uint8[n], into `out` with `bits` bits each, at most 8. n must be a multiple of 8."""
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(8):
            word |= np.uint64(codes[8 * k + j]) << np.uint64(bits * (7 - j))
        for j in range(min(bits, len(out) - k * bits)):
            out[k * bits + j] = np.uint8((word >> np.uint64(8 * (bits - 1 - j))) & np.uint64(255))


def add_levels(codes: Tensor, levels: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> None:
    """Add alpha * (code - levels) * norm to each element of out, float[d], in place.

    `codes`, uint8[d], contains the code of each element. `norms` contains the norm of each bucket of `bucket` elements.
    """
    check_room("levels", codes, len(out))
    check_room("norms", norms, -(-len(out) // bucket))
    c, s, o = codes.numpy(), norms.numpy(), out.numpy()
    scale = scalar(alpha, o)

    def part(start: int, stop: int) -> None:
        _add_levels(c[start:], levels, bucket, s[start // bucket :], o[start:stop], scale)

    in_parts(len(out), bucket, part)


@compiled_loop
def _add_levels(codes: Array, levels: int, bucket: int, norms: Array, out: Array, alpha: float) -> None:
    for start in range(0, len(out), bucket):
        x, norm = out[start : start + bucket], norms[start // bucket]
        c = codes[start : start + len(x)]
        for i in range(len(x)):
            x[i] += (alpha * out.dtype.type(np.int32(c[i]) - np.int32(levels))) * norm  # this order cannot overflow


@compiled_loop
def unpack_codes(packed: Array, bits: int, codes: Array) -> None:
    """Unpack n codes of `bits` bits each, at most 8, from `packed` into `codes`, uint8[n]. n must be a multiple of
    8."""
    mask = np.uint64((1 << bits) - 1)
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(bits):  # `packed` may lack some bytes of the last word
            place = k * bits + j
            word = (word << np.uint64(8)) | (np.uint64(packed[place]) if place < len(packed) else np.uint64(0))
        for j in range(8):
            codes[8 * k + j] = np.uint8((word >> np.uint64(bits * (7 - j))) & mask)


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Pack n integers below 2^width, int64[n], in `width` bits each, most significant bit first. Returns
    uint8[ceil(n width / 8)]. `width` must be at most 56."""
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


def pack_rice(numbers: Tensor, b: int, unary: int) -> Tensor:
    """Encode nonnegative integers in Rice codes with parameter b, the number of bits of each remainder. Returns
    uint8[...]. See `wire.pack_rice`."""
    return torch.from_numpy(_pack_rice(numbers.numpy(), b, unary))


@compiled_loop
def _pack_rice(numbers: Array, b: int, unary: int) -> Array:
    coded = np.zeros((unary + 7) // 8 + (len(numbers) * b + 7) // 8, np.uint8)
    # For one group of numbers at a time, write the quotients by 2^b in unary, as zeros and a one, to the first part of
    # `coded`. Write the remainders to its second part, `rest`.
    remainders, bit = np.empty(_GROUP, np.int64), np.int64(0)
    rest = coded[(unary + 7) // 8 :]
    for group in range(0, len(numbers), _GROUP):
        held = numbers[group : group + _GROUP]
        for i in range(len(held)):
            number = np.int64(held[i])
            bit += number >> b
            coded[bit >> 3] |= np.uint8(128 >> (bit & 7))
            bit += 1
            remainders[i] = number & ((np.int64(1) << b) - 1)
        _pack_numbers(remainders[: len(held)], b, rest[group * b // 8 :])
    return coded


def count_codes(codes: Tensor) -> Tensor:
    # Count in four tables, so that consecutive increments for equal codes are independent.
    tables = torch.zeros(4, 256, dtype=torch.int64)
    _count_codes(codes.numpy(), tables.numpy())
    return tables.sum(0)


@compiled_loop
def _count_codes(codes: Array, tables: Array) -> None:
    for i in range(0, len(codes) // 4 * 4, 4):
        for j in range(4):
            tables[j, codes[i + j]] += 1
    for i in range(len(codes) // 4 * 4, len(codes)):
        tables[0, codes[i]] += 1


def pack_layer(
    codes: Tensor, low: int, high: int, inverted: bool, b: int, coded: int, going_on: int
) -> tuple[Tensor, Tensor]:
    """Encode one layer of quantized levels (see `compressors.levels`). The layer consists of the elements of `codes`,
    uint8[n], that are below `low` or above `high`.

    Returns the code, uint8[...], and the layer's elements in order, uint8[going_on]. The code contains gaps between
    positions in `codes`, as Rice codes.

    Args:
        codes: The sum of the level and the largest level, for each member of the previous layer.
        low: Elements below this number belong to the layer.
        high: Elements above this number belong to the layer.
        inverted: False: encode the positions of the layer's elements. True: encode the positions of all other elements.
        b: The parameter of the Rice codes.
        coded: The number of positions to encode.
        going_on: The number of elements of the layer.
    """
    dtype = np.int32 if len(codes) < 1 << 31 else np.int64
    places = np.empty(going_on + 1, dtype)
    _list_places(codes.numpy(), low, high, False, places)
    kept = codes.index_select(0, torch.from_numpy(places[:going_on]))
    if inverted:
        places = np.empty(coded + 1, dtype)
        _list_places(codes.numpy(), low, high, True, places)
    gaps = np.diff(places[:coded], prepend=dtype(-1))
    gaps -= 1
    return torch.from_numpy(_pack_rice(gaps, b, int((gaps >> b).sum()) + coded)), kept


@compiled_loop
def _list_places(codes: Array, low: int, high: int, inverted: bool, places: Array) -> None:
    """Write to `places` the indices of the codes below `low` or above `high`. With `inverted`, write the indices of the
    codes from `low` to `high` instead. `places` must have one element more than the number of indices to write."""
    n: Any = 0
    # No branches: write every index to place n, and increment n only if the index belongs in `places`.
    for i in range(len(codes)):
        places[n] = i
        n += np.int64(((codes[i] < low) | (codes[i] > high)) != inverted)


def unpack_rice(packed: Tensor, n: int, b: int, most: int, dtype: torch.dtype, padded: bool) -> Tensor | None:
    """Invert `pack_rice`: return the n numbers, or None unless `packed` encodes exactly n numbers of at most `most`.
    With `padded`, any number of zero bytes may follow the quotients; otherwise None is returned if such bytes
    follow."""
    split = len(packed) - -(-n * b // 8)
    if split < 0:
        return None
    coded, out = packed.numpy(), torch.empty(n, dtype=dtype)
    return out if _unpack_rice(coded[:split], coded[split:], b, most, padded, out.numpy()) else None


_IS_ONE = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
_ONES = _IS_ONE.sum(1).astype(np.int64)  # number of ones in a byte
# Row i has the positions of the ones in the byte i, followed by the positions of its zeros.
_PLACES = np.argsort(1 - _IS_ONE, axis=1, kind="stable").astype(np.int64)


@compiled_loop
def _unpack_rice(unary: Array, rest: Array, b: int, most: int, padded: bool, out: Array) -> bool:
    ends, remainders = np.empty(_GROUP + 17, np.int64), np.zeros(_GROUP, np.int64)
    # `ends` begins with the place of the last 1 bit of the previous group. The places of the next 1 bits follow.
    ends[0] = -1
    pending, byte_at, longest, largest = 0, 0, np.int64(0), np.int64(0)
    for group in range(0, len(out), _GROUP):
        numbers = out[group : group + _GROUP]
        n = len(numbers)
        # Read the unary code of this group, and up to seven 1 bits of the next group. The loop has no branches: the
        # places of 0 bits are written too, and then overwritten.
        while pending < n and byte_at < len(unary):
            byte, found = unary[byte_at], ends[pending + 1 : pending + 9]
            for i in range(8):
                found[i] = 8 * byte_at + _PLACES[byte, i]
            pending += _ONES[byte]
            byte_at += 1
        if pending < n:
            return False
        _unpack_numbers(rest[group * b // 8 :], b, remainders[:n])
        for i in range(n):
            quotient = ends[i + 1] - ends[i] - 1
            number = (quotient << b) | remainders[i]
            longest, largest = max(longest, quotient), max(largest, number)
            numbers[i] = number
        pending -= n
        for i in range(pending + 1):
            ends[i] = ends[n + i]
    while padded and byte_at < len(unary) and unary[byte_at] == 0:
        byte_at += 1
    # Check the longest quotient too: shifted by b bits, it could overflow to a small `number`.
    return bool(pending == 0 and byte_at == len(unary) and longest <= most >> b and largest <= most)


def unpack_numbers(packed: Tensor, width: int, n: int, dtype: torch.dtype) -> Tensor:
    check_room("packed numbers", packed, -(-n * width // 8))
    p = packed.numpy()
    if width <= 8:
        codes = torch.empty(-(-n // 8) * 8, dtype=torch.uint8)
        c = codes.numpy()
        in_parts(len(c), 8, lambda start, stop: unpack_codes(p[start * width // 8 :], width, c[start:stop]))
        return codes[:n].to(dtype)
    out = torch.empty(n, dtype=dtype)
    _unpack_numbers(p, width, out.numpy())
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
