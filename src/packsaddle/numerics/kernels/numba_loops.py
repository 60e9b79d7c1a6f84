"""Inner loops compiled by numba, each of which reads and writes memory once; `kernels.kernel` returns them by name.

For sparse vectors: runs of b coordinates (cells), keyed permutations, selection by magnitude. For quantized vectors:
signs, levels and packed numbers. The loops that draw random numbers are in `numba_random`.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import (
    BLOCK,
    MAGNITUDE,
    Array,
    bits_of,
    compiled_loop,
    compiled_sum,
    in_parts,
    scalar,
)
from packsaddle.numerics.kernels.numba_random import add_cell_gaussians, add_gaussians, word

__all__ = [
    "add_cell_gaussians",
    "add_cells",
    "add_gaussians",
    "add_levels",
    "add_signs",
    "energy_histogram",
    "feistel_sample",
    "gather_cells",
    "largest_of_chunks",
    "pack_gaps",
    "pack_levels",
    "pack_numbers",
    "pack_signs",
    "reaching",
    "sum_of_magnitudes",
    "unpack_gaps",
    "unpack_numbers",
]


def pack_signs(v: Tensor) -> Tensor:
    """Return a bit for each coordinate, 1 where v >= 0, uint8[ceil(d / 8)], most significant bit first."""
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
    """Return ||v||_1, summed in double precision."""
    a = v.numpy()
    return float(sum(in_parts(len(v), 1, lambda start, stop: _sum_of_magnitudes(a[start:stop]))))


@compiled_sum
def _sum_of_magnitudes(v: Array) -> float:
    s = 0.0
    for i in range(len(v)):
        s += abs(np.float64(v[i]))
    return s


def add_signs(packed: Tensor, first: int, scale: Tensor, out: Tensor) -> None:
    """Add +scale or -scale, float[], to each of out, float[n], as the bits from number `first` on say."""
    p, o = packed.numpy(), out.numpy()
    s = scalar(float(scale), o)
    in_parts(len(out), 8, lambda start, stop: _add_signs(p, first + start, s, o[start:stop]))


@compiled_loop
def _add_signs(packed: Array, first: int, scale: float, out: Array) -> None:
    head = min(len(out), -first % 8)
    full = (len(out) - head) // 8
    whole, body = packed[(first + head) >> 3 :][:full], out[head : head + 8 * full]
    for j in range(len(whole)):  # over slices: numba then knows that no index is negative, and makes vector code
        for i in range(8):
            body[8 * j + i] += scale if (whole[j] >> (7 - i)) & 1 else -scale
    for i in range(len(out)):
        if i < head or i >= head + 8 * full:
            out[i] += scale if (packed[(first + i) >> 3] >> (7 - ((first + i) & 7))) & 1 else -scale


def pack_levels(v: Tensor, levels: int, bits: int, bucket: int, keys: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Return QSGD's codes, uint8[ceil(d bits / 8)], and each bucket's norm; bits at most 8. See
    `compressors.quantized`."""
    d = len(v)
    out = torch.empty(-(-d * bits // 8), dtype=torch.uint8)
    norms = torch.empty(-(-d // bucket), dtype=v.dtype)
    a, b, o, s = v.numpy(), bits_of(v), out.numpy(), norms.numpy()
    mask = b.dtype.type(MAGNITUDE[v.dtype])
    first, second = np.uint32(keys[0]), np.uint32(keys[1])

    def part(start: int, stop: int) -> None:
        places, buckets = slice(start * bits // 8, -(-stop * bits // 8)), slice(start // bucket, -(-stop // bucket))
        _pack_levels(
            a[start:stop], b[start:stop], mask, levels, bits, bucket, first, second, start, o[places], s[buckets]
        )

    in_parts(d, 8 * bucket, part)
    return out, norms


@compiled_loop
def _pack_levels(
    v: Array,
    bits_of_v: Array,
    mask: int,
    levels: int,
    bits: int,
    bucket: int,
    first: Any,
    second: Any,
    offset: int,
    out: Array,
    norms: Array,
) -> None:
    # Loops run over slices: numba then knows that no index is negative, and makes vector code of them.
    unit, codes = np.empty(bucket, v.dtype), np.zeros(8 * bucket, np.uint8)  # eight buckets end at a byte
    for group in range(0, len(v), 8 * bucket):
        held = v[group : group + 8 * bucket]
        for start in range(0, len(held), bucket):
            x, c = held[start : start + bucket], codes[start : start + bucket]
            x_bits, place = bits_of_v[group + start : group + start + len(x)], offset + group + start
            norms[(group + start) // bucket] = _levels_of(
                x, x_bits, mask, unit[: len(x)], v.dtype.type(levels), first, second, np.uint32(place), c
            )
        codes[len(held) :] = 0
        _pack_codes(codes[: -(-len(held) // 8) * 8], bits, out[group * bits // 8 :])


@compiled_loop
def _levels_of(
    x: Array, bits: Array, mask: int, unit: Array, top: float, first: Any, second: Any, place: Any, codes: Array
) -> Any:
    zero, one = x.dtype.type(0), x.dtype.type(1)
    most = bits.dtype.type(0)
    for i in range(len(x)):  # as integers, magnitudes have an order that NaN is part of, and vector code
        most = max(most, bits[i] & mask)
    scratch = np.empty(1, bits.dtype)
    scratch[0] = most
    largest = scratch.view(x.dtype)[0]
    if not np.isfinite(largest):
        codes[:] = np.uint8(top)
        return x.dtype.type(np.nan)
    for i in range(len(x)):
        unit[i] = abs(x[i]) / (largest if largest > zero else one)
    norm = x.dtype.type(np.sqrt(_sum_of_squares(unit)))
    divisor = max(norm, one)
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
def _pack_codes(codes: Array, bits: int, out: Array) -> None:
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(8):
            word |= np.uint64(codes[8 * k + j]) << np.uint64(bits * (7 - j))
        for j in range(min(bits, len(out) - k * bits)):
            out[k * bits + j] = np.uint8((word >> np.uint64(8 * (bits - 1 - j))) & np.uint64(255))


def add_levels(packed: Tensor, levels: int, bits: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> None:
    """Add alpha (code - levels) norm to out, float[d], for the codes and norms of `pack_levels`."""
    p, s, o = packed.numpy(), norms.numpy(), out.numpy()
    scale = scalar(alpha, o)

    def part(start: int, stop: int) -> None:
        _add_levels(p[start * bits // 8 :], levels, bits, bucket, s[start // bucket :], o[start:stop], scale)

    in_parts(len(out), 8 * bucket, part)


@compiled_loop
def _add_levels(packed: Array, levels: int, bits: int, bucket: int, norms: Array, out: Array, alpha: float) -> None:
    codes = np.empty(8 * bucket, np.uint8)
    for group in range(0, len(out), 8 * bucket):
        held = out[group : group + 8 * bucket]
        _unpack_codes(packed[group * bits // 8 :], bits, codes[: -(-len(held) // 8) * 8])
        for start in range(0, len(held), bucket):
            x, c, norm = held[start : start + bucket], codes[start : start + bucket], norms[(group + start) // bucket]
            for i in range(len(x)):
                x[i] += alpha * (out.dtype.type(np.int32(c[i]) - np.int32(levels)) * norm)


@compiled_loop
def _unpack_codes(packed: Array, bits: int, codes: Array) -> None:
    mask = np.uint64((1 << bits) - 1)
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(bits):  # the last word may be cut short
            place = k * bits + j
            word = (word << np.uint64(8)) | (np.uint64(packed[place]) if place < len(packed) else np.uint64(0))
        for j in range(8):
            codes[8 * k + j] = np.uint8((word >> np.uint64(bits * (7 - j))) & mask)


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Pack int64[n] numbers below 2^width, width at most 56, most significant bit first, uint8[ceil(n width / 8)]."""
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
    """Code int64[k] indices by their gaps, `kept` after each multiple of `size`, uint8[...]. See `wire.pack_gaps`."""
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


def unpack_gaps(packed: Tensor, k: int, kept: int, size: int, b: int) -> Tensor:
    """Return the int64[k] indices that `pack_gaps` coded."""
    out = torch.empty(k, dtype=torch.int64)
    split = len(packed) - -(-k * b // 8)
    _unpack_gaps(packed.numpy()[:split], packed.numpy()[split:], kept, size, b, out.numpy())
    return out


@compiled_loop
def _unpack_gaps(unary: Array, remainders: Array, kept: int, size: int, b: int, out: Array) -> None:
    ends, mask, accumulator = np.empty(9, np.int64), np.uint64((1 << b) - 1), np.uint64(0)
    held, place, m, before, last = 0, 0, 0, np.int64(-1), np.int64(-1)
    for j in range(len(unary)):
        byte = unary[j]
        found: Any = 0
        for i in range(8):  # no branch to mispredict: where there is no one, what is written is written over
            ends[found] = 8 * j + i
            found += np.int64((byte >> (7 - i)) & 1)
        for i in range(min(found, len(out) - m)):
            while held < b:
                accumulator = (accumulator << np.uint64(8)) | np.uint64(remainders[place])
                held += 8
                place += 1
            held -= b
            if m % kept == 0:
                last = np.int64(m // kept) * size - 1
            quotient = np.uint64(ends[i] - before - 1)
            before = ends[i]
            last += np.int64((quotient << np.uint64(b)) | ((accumulator >> np.uint64(held)) & mask)) + 1
            out[m] = last
            m += 1


def unpack_numbers(packed: Tensor, width: int, n: int) -> Tensor:
    """Return the int64[n] numbers that `pack_numbers` packed."""
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


def gather_cells(v: Tensor, cells: Tensor, b: int) -> Tensor:
    """Return v at the cells, float[m b], with zeros where the last cell of the grid is cut short."""
    out = torch.empty(cells.numel() * b, dtype=v.dtype)
    _gather_cells(v.numpy(), cells.numpy(), b, out.numpy())
    return out


@compiled_loop
def _gather_cells(v: Array, cells: Array, b: int, out: Array) -> None:
    d = len(v)
    for i in range(len(cells)):
        start = cells[i] * b
        # Loops run over slices: numba then knows that no index is negative, and makes vector code of them.
        source, target = v[start : min(d, start + b)], out[i * b : (i + 1) * b]
        for j in range(len(source)):
            target[j] = source[j]
        target[len(source) :] = 0.0


def add_cells(out: Tensor, cells: Tensor, b: int, values: Tensor, alpha: float) -> None:
    """Add alpha times values, float[m b], to out, float[d], at the cells."""
    scale = scalar(alpha, out.numpy())
    _add_cells(out.numpy(), cells.numpy(), b, values.numpy(), scale)


@compiled_loop
def _add_cells(out: Array, cells: Array, b: int, values: Array, alpha: float) -> None:
    d = len(out)
    for i in range(len(cells)):
        start = cells[i] * b
        target = out[start : min(d, start + b)]
        source = values[i * b : i * b + len(target)]
        for j in range(len(target)):
            target[j] += alpha * source[j]


def feistel_sample(n: int, k: int, bits: int, keys: list[int]) -> Tensor:
    """Return the permutation's values at 0..k-1, int64[k], before the rotation; the last key is not used."""
    out = torch.empty(k, dtype=torch.int64)
    _feistel(out.numpy(), np.uint64(n), bits // 2, bits - bits // 2, np.array(keys[:-1], dtype=np.uint64))
    return out


@compiled_loop
def _feistel(out: Array, n: np.uint64, low_bits: int, high_bits: int, keys: Array) -> None:
    low_mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    high_mask = (np.uint64(1) << np.uint64(high_bits)) - np.uint64(1)
    for i in range(len(out)):
        x = np.uint64(i)
        while True:
            low, high = x & low_mask, x >> np.uint64(low_bits)
            for r in range(0, len(keys), 2):
                high ^= _round(low, keys[r]) & high_mask
                low ^= _round(high, keys[r + 1]) & low_mask
            x = (high << np.uint64(low_bits)) | low
            if x < n:
                break
        out[i] = np.int64(x)


@compiled_loop
def _round(half: np.uint64, key: np.uint64) -> np.uint64:
    h = (half + key) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h >> np.uint64(32)


def reaching(v: Tensor, threshold: int, expected: int) -> Tensor:
    """Return the increasing indices, about `expected`, of the magnitudes that, as integers, reach a threshold."""
    bits, mask = bits_of(v), MAGNITUDE[v.dtype]
    limit = bits.dtype.type(threshold)

    def part(start: int, stop: int) -> Tensor:
        room = min(2 * (expected * (stop - start) // max(1, len(v))) + 16 * BLOCK, stop - start + BLOCK)
        while True:
            out = torch.empty(room, dtype=torch.int64)
            found = _select(bits[start:stop], limit, bits.dtype.type(mask), start, out.numpy())
            if found + BLOCK <= room:
                return out[:found]
            room = found + BLOCK

    parts = in_parts(len(v), BLOCK, part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@compiled_loop
def _select(bits: Array, limit: int, mask: int, offset: int, out: Array) -> Any:
    """Return how many reach the limit; they are all in `out` if BLOCK places are left over."""
    m: Any = 0
    full = len(bits) // BLOCK * BLOCK
    for s in range(0, full, BLOCK):
        block: Array = bits[s : s + BLOCK]
        c: Any = np.int32(0)
        for i in range(BLOCK):  # vector code; most blocks have no hit
            c += np.int32((block[i] & mask) >= limit)
        if c > 0:
            if m + BLOCK > len(out):
                m += c
                continue
            n: Any = m
            for i in range(BLOCK):  # no branch to mispredict: what does not reach is written over
                out[n] = offset + s + i
                n += np.int64((block[i] & mask) >= limit)
            m = n
    for i in range(full, len(bits)):
        if (bits[i] & mask) >= limit:
            if m < len(out):
                out[m] = offset + i
            m += 1
    return m


def largest_of_chunks(v: Tensor, chunk: int, kept: int, kept_of_last: int) -> Tensor:
    """Return the `kept` largest magnitudes' indices of each chunk, and of one that is cut short `kept_of_last`'s,
    increasing int64[...]; of equal ones the first."""
    d = len(v)
    out = torch.empty(d // chunk * kept + (kept_of_last if d % chunk else 0), dtype=torch.int64)
    bits, o = bits_of(v), out.numpy()
    mask, step = bits.dtype.type(MAGNITUDE[v.dtype]), 1 << (22 if v.dtype == torch.float32 else 51)

    def part(start: int, stop: int) -> None:
        _largest_of_chunks(bits[start:stop], mask, step, chunk, kept, kept_of_last, start, o[start // chunk * kept :])

    in_parts(d, chunk, part)
    return out


@compiled_loop
def _largest_of_chunks(
    bits: Array, mask: int, step: int, chunk: int, kept: int, kept_of_last: int, offset: int, out: Array
) -> None:
    room = min(chunk, len(bits))
    scratch, found = np.empty(room, bits.dtype), np.empty(room + 1, np.int32)
    done, guess = 0, np.int64(0)
    for start in range(0, len(bits), chunk):
        block = bits[start : start + chunk]
        k = kept if len(block) == chunk else kept_of_last
        # Somewhat less than what the chunk before reached; where too few do that, all are ranked.
        m = _reached_places(block, mask, block.dtype.type(guess), found)
        if m < k:
            m = _reached_places(block, mask, block.dtype.type(0), found)
        magnitudes = scratch[:m]
        for i in range(len(magnitudes)):
            magnitudes[i] = block[found[i]] & mask
        least = _least_of_largest(magnitudes, k, step)
        guess = max(np.int64(0), least - step // 4)
        _write_reached(magnitudes, block.dtype.type(least), k, found, offset + start, out[done : done + k])
        done += k


@compiled_loop
def _reached_places(bits: Array, mask: int, limit: Any, found: Array) -> Any:
    """List where a limit is reached, and return how many there are; `found` has a place more, for what is not."""
    m: Any = 0
    for i in range(len(bits)):
        found[m] = i
        m += np.int64((bits[i] & mask) >= limit)
    return m


@compiled_loop
def _least_of_largest(magnitudes: Array, k: int, step: int) -> Any:
    """Return an integer that k magnitudes reach, or the k-th largest of equal ones, which more do.

    From the largest on downwards in growing steps, about half a power of two at first, then by bisection.
    """
    most = magnitudes.dtype.type(0)
    for i in range(len(magnitudes)):
        most = max(most, magnitudes[i])
    high = np.int64(most)
    low, reached = high, _count_reaching(magnitudes, most)
    while reached < k:
        high, low = low, max(np.int64(0), low - step)
        step = min(2 * step, 1 << 61)
        reached = _count_reaching(magnitudes, magnitudes.dtype.type(low))
    while reached > k and high - low > 1:
        middle = low + (high - low) // 2
        c = _count_reaching(magnitudes, magnitudes.dtype.type(middle))
        if c >= k:
            low, reached = middle, c
        else:
            high = middle
    return low


@compiled_loop
def _count_reaching(magnitudes: Array, limit: Any) -> Any:
    c: Any = np.int32(0)
    for i in range(len(magnitudes)):
        c += np.int32(magnitudes[i] >= limit)
    return np.int64(c)


@compiled_loop
def _write_reached(magnitudes: Array, limit: Any, k: int, found: Array, offset: int, out: Array) -> None:
    """Write offset + found where the limit is reached; of those equal to it the first, so that there are k."""
    equal: Any = k
    for i in range(len(magnitudes)):
        equal -= np.int64(magnitudes[i] > limit)
    m = 0
    for i in range(len(magnitudes)):
        is_equal = magnitudes[i] == limit
        if magnitudes[i] > limit or (is_equal and equal > 0):
            out[m] = offset + np.int64(found[i])
            m += 1
            equal -= np.int64(is_equal)


def energy_histogram(v: Tensor, top: float, first_bits: int) -> tuple[Tensor, Tensor]:
    """Return how many magnitudes, and how much of ||v / top||^2, have each first bits; int64 and float64."""
    bits, mask = bits_of(v), MAGNITUDE[v.dtype]
    shift = 8 * v.element_size() - 1 - first_bits

    def part(start: int, stop: int) -> tuple[Array, Array]:
        # Four tables, so that runs of one bin do not wait for each other's sum.
        counts, energy = np.zeros((4, 1 << first_bits), np.int64), np.zeros((4, 1 << first_bits))
        _histogram(v.numpy()[start:stop], bits[start:stop], bits.dtype.type(mask), shift, top, counts, energy)
        return counts.sum(0), energy.sum(0)

    parts = in_parts(len(v), BLOCK, part)
    return torch.from_numpy(sum(p[0] for p in parts)), torch.from_numpy(sum(p[1] for p in parts))


@compiled_loop
def _histogram(v: Array, bits: Array, mask: int, shift: int, top: float, counts: Array, energy: Array) -> None:
    for i in range(0, len(v) // 4 * 4, 4):
        for j in range(4):
            b = (bits[i + j] & mask) >> shift
            x = np.float64(v[i + j]) / top
            counts[j, b] += 1
            energy[j, b] += x * x
    for i in range(len(v) // 4 * 4, len(v)):
        b = (bits[i] & mask) >> shift
        x = np.float64(v[i]) / top
        counts[0, b] += 1
        energy[0, b] += x * x
