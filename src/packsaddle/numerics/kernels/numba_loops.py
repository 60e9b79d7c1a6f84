"""Inner loops compiled by numba, each of which reads and writes memory once; `kernels.kernel` returns them by name.

For sparse vectors: runs of b coordinates (cells), keyed permutations, selection by magnitude. For quantized vectors:
signs, levels and packed numbers. For error memories: a sum that is taken only where it is finite. The loops that draw
random numbers are in `numba_random`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import (
    BLOCK,
    MAGNITUDE,
    WORTH_THREADS,
    Array,
    bits_of,
    compiled_fma,
    compiled_loop,
    compiled_sum,
    in_parts,
    scalar,
)
from packsaddle.numerics.kernels.numba_random import add_cell_gaussians, add_gaussians, word

__all__ = [
    "add_cell_gaussians",
    "add_cells",
    "add_finite",
    "add_gaussians",
    "add_levels",
    "add_signs",
    "energy_histogram",
    "feistel_sample",
    "gather_cells",
    "pack_levels",
    "pack_numbers",
    "pack_signs",
    "reaching",
    "sum_of_magnitudes",
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


def add_finite(sums: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[list[tuple[int, int, int]], float]:
    """Add alpha more to out, in place, for every (out, more, alpha), both float[n], until a square is not finite.

    Returns the stretches that were added to, as numbers of the sum, start and stop, and the sum of the squares that
    out and alpha more had there; infinite if a block was left out. All arrays are made before the first is touched:
    little is left in a cache after that.
    """
    arrays = [(out.numpy(), more.numpy(), alpha) for out, more, alpha in sums]
    ready = [(out, more, scalar(alpha, out)) for out, more, alpha in arrays]
    added, total = [], 0.0
    for i, (o, m, factor) in enumerate(ready):
        if len(o) < WORTH_THREADS:
            stop, squares = _add_finite(o, m, factor)
            added.append((i, 0, stop))
        else:
            squares = 0.0
            for start, stop, more in _in_threads(o, m, factor):
                added.append((i, start, stop))
                squares += more
        total += squares
        if squares == np.inf:
            break
    return added, total


def _in_threads(out: Array, more: Array, factor: Any) -> list[tuple[int, int, float]]:
    def part(start: int, stop: int) -> tuple[int, int, float]:
        added, squares = _add_finite(out[start:stop], more[start:stop], factor)
        return start, start + added, squares

    return in_parts(len(out), _LINE, part)


_LINE = 128  # elements: few enough for the next ones to be read from memory while these are added


@compiled_fma
def _add_finite(out: Array, more: Array, factor: Any) -> Any:
    total = 0.0
    for start in range(0, len(out), _LINE):
        o, m = out[start : start + _LINE], more[start : start + _LINE]
        squares = o.dtype.type(0)
        for i in range(len(o)):
            u = factor * m[i]
            squares += o[i] * o[i] + u * u
        if not np.isfinite(squares):
            return start, np.inf
        for i in range(len(o)):
            o[i] = o[i] + factor * m[i]
        total += squares
    return len(out), total
