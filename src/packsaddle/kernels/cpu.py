"""Inner loops that numba compiles: each reads and writes memory once. The functions without an underscore take tensors.

Vectors are cut in parts for as many threads as torch uses, so the two never ask for more cores than torch was given.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

_WORTH_THREADS = 1 << 18  # elements of a part that are worth a thread
_BLOCK = 64  # elements that are looked at together
_BRANCHLESS = 0.012  # density of hits from which looking at every element is faster
_MAGNITUDE = {torch.float32: 0x7FFFFFFF, torch.float64: 0x7FFFFFFFFFFFFFFF}
_INTEGER = {torch.float32: torch.int32, torch.float64: torch.int64}
HISTOGRAM_BITS = 12  # of a magnitude, from the top: its exponent and the first bits of its mantissa

_compile = numba.njit(nogil=True, cache=True, error_model="numpy")
_compile_sum = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})  # sums of any order
_Array = np.ndarray
T = TypeVar("T")


def _in_parts(n: int, multiple: int, work: Callable[[int, int], T]) -> list[T]:
    """Call work(start, stop) on parts of [0, n), begun at multiples of `multiple`, one for each of torch's threads."""
    parts = max(1, min(torch.get_num_threads(), n // _WORTH_THREADS))
    if parts == 1:
        return [work(0, n)]
    edges = [min(n, i * n // parts // multiple * multiple) for i in range(parts)] + [n]
    return list(_pool(parts).map(work, edges[:-1], edges[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="packsaddle")


def _bits(v: Tensor) -> _Array:
    return v.detach().view(_INTEGER[v.dtype]).numpy()


# --- sampling: a keyed permutation of [0, n), see `seeds`


def feistel_sample(n: int, k: int, bits: int, keys: list[int]) -> Tensor:
    """Return the permutation's values at 0..k-1, int64[k], before the rotation; the last key is not used."""
    out = torch.empty(k, dtype=torch.int64)
    _feistel(out.numpy(), np.uint64(n), bits // 2, bits - bits // 2, np.array(keys[:-1], dtype=np.uint64))
    return out


@_compile
def _feistel(out: _Array, n: np.uint64, low_bits: int, high_bits: int, keys: _Array) -> None:
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


@_compile
def _round(half: np.uint64, key: np.uint64) -> np.uint64:
    h = (half + key) * np.uint64(0x9E3779B97F4A7C15)
    h = (h ^ (h >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return h >> np.uint64(32)


# --- cells: runs of b coordinates, see `compress.cells`


def gather_cells(v: Tensor, cells: Tensor, b: int) -> Tensor:
    """Return v at the cells, float[m b], with zeros where the last cell of the grid is cut short."""
    out = torch.empty(cells.numel() * b, dtype=v.dtype)
    _gather_cells(v.numpy(), cells.numpy(), b, out.numpy())
    return out


@_compile
def _gather_cells(v: _Array, cells: _Array, b: int, out: _Array) -> None:
    d = len(v)
    for i in range(len(cells)):
        start = cells[i] * b
        if start + b <= d:
            for j in range(b):
                out[i * b + j] = v[start + j]
        else:
            for j in range(b):
                out[i * b + j] = v[start + j] if start + j < d else 0.0


def add_cells(out: Tensor, cells: Tensor, b: int, values: Tensor, alpha: float) -> None:
    """Add alpha times values, float[m b], to out, float[d], at the cells."""
    scale = out.numpy().dtype.type(alpha)
    _add_cells(out.numpy(), cells.numpy(), b, values.numpy(), scale)


@_compile
def _add_cells(out: _Array, cells: _Array, b: int, values: _Array, alpha: float) -> None:
    d = len(out)
    for i in range(len(cells)):
        start = cells[i] * b
        if start + b <= d:
            for j in range(b):
                out[start + j] += alpha * values[i * b + j]
        else:
            for j in range(d - start):
                out[start + j] += alpha * values[i * b + j]


# --- selection by magnitude


def reaching(v: Tensor, threshold: Tensor, expected: int) -> Tensor:
    """Return the increasing indices, about `expected`, of the magnitudes that reach a threshold; NaN does."""
    bits, mask = _bits(v), _MAGNITUDE[v.dtype]
    limit = bits.dtype.type(int(_bits(threshold.view(1))[0]) & mask)
    branchless = expected > _BRANCHLESS * len(v)
    select = _select_branchless if branchless else _select

    def part(start: int, stop: int) -> Tensor:
        found = _count(bits[start:stop], limit, bits.dtype.type(mask))
        out = torch.empty(found + 1, dtype=torch.int64)  # the branchless loop writes one place further
        select(bits[start:stop], limit, bits.dtype.type(mask), start, out.numpy())
        return out[:found]

    return torch.cat(_in_parts(len(v), _BLOCK, part))


@_compile
def _count(bits: _Array, limit: int, mask: int) -> int:
    c = 0
    for i in range(len(bits)):
        c += (bits[i] & mask) >= limit
    return c


@_compile
def _select(bits: _Array, limit: int, mask: int, offset: int, out: _Array) -> None:
    n, m = len(bits), 0
    full = n // _BLOCK * _BLOCK
    for s in range(0, full, _BLOCK):
        c = np.int32(0)
        for i in range(_BLOCK):  # vector code; most blocks have no hit
            c += np.int32((bits[s + i] & mask) >= limit)
        if c > 0:
            for i in range(s, s + _BLOCK):
                if (bits[i] & mask) >= limit:
                    out[m] = offset + i
                    m += 1
    for i in range(full, n):
        if (bits[i] & mask) >= limit:
            out[m] = offset + i
            m += 1


@_compile
def _select_branchless(bits: _Array, limit: int, mask: int, offset: int, out: _Array) -> None:
    m: Any = 0
    for i in range(len(bits)):
        out[m] = offset + i
        m += np.int64((bits[i] & mask) >= limit)


def energy_histogram(v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return how many magnitudes, and how much of ||scale v||^2, lie in each bin; int64 and float64."""
    bits, mask = _bits(v), _MAGNITUDE[v.dtype]
    shift = 8 * v.element_size() - 1 - HISTOGRAM_BITS

    def part(start: int, stop: int) -> tuple[_Array, _Array]:
        # Four tables, so that runs of one bin do not wait for each other's sum.
        counts, energy = np.zeros((4, 1 << HISTOGRAM_BITS), np.int64), np.zeros((4, 1 << HISTOGRAM_BITS))
        _histogram(v.numpy()[start:stop], bits[start:stop], bits.dtype.type(mask), shift, scale, counts, energy)
        return counts.sum(0), energy.sum(0)

    parts = _in_parts(len(v), _BLOCK, part)
    return torch.from_numpy(sum(p[0] for p in parts)), torch.from_numpy(sum(p[1] for p in parts))


@_compile
def _histogram(v: _Array, bits: _Array, mask: int, shift: int, scale: float, counts: _Array, energy: _Array) -> None:
    for i in range(0, len(v) // 4 * 4, 4):
        for j in range(4):
            b = (bits[i + j] & mask) >> shift
            x = np.float64(v[i + j]) * scale
            counts[j, b] += 1
            energy[j, b] += x * x
    for i in range(len(v) // 4 * 4, len(v)):
        b = (bits[i] & mask) >> shift
        x = np.float64(v[i]) * scale
        counts[0, b] += 1
        energy[0, b] += x * x


# --- few bits for every coordinate


def pack_signs(v: Tensor) -> Tensor:
    """Return a bit for each coordinate, 1 where v >= 0, uint8[ceil(d / 8)], most significant bit first."""
    out = torch.empty(-(-len(v) // 8), dtype=torch.uint8)
    a, o = v.numpy(), out.numpy()
    _in_parts(len(v), 8, lambda start, stop: _pack_signs(a[start:stop], o[start // 8 :]))
    return out


@_compile
def _pack_signs(v: _Array, out: _Array) -> None:
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
    return float(sum(_in_parts(len(v), 1, lambda start, stop: _sum_of_magnitudes(a[start:stop]))))


@_compile_sum
def _sum_of_magnitudes(v: _Array) -> float:
    s = 0.0
    for i in range(len(v)):
        s += abs(np.float64(v[i]))
    return s


def add_signs(packed: Tensor, first: int, scale: float, out: Tensor) -> None:
    """Add +scale or -scale to each of out, float[n], as the bits from number `first` on say."""
    p, o = packed.numpy(), out.numpy()
    s = o.dtype.type(scale)
    _in_parts(len(out), 8, lambda start, stop: _add_signs(p, first + start, s, o[start:stop]))


@_compile
def _add_signs(packed: _Array, first: int, scale: float, out: _Array) -> None:
    head = min(len(out), -first % 8)
    full = (len(out) - head) // 8
    whole, body = packed[(first + head) >> 3 :][:full], out[head : head + 8 * full]
    for j in range(len(whole)):  # over slices: numba then knows that no index is negative, and makes vector code
        for i in range(8):
            body[8 * j + i] += scale if (whole[j] >> (7 - i)) & 1 else -scale
    for i in range(len(out)):
        if i < head or i >= head + 8 * full:
            out[i] += scale if (packed[(first + i) >> 3] >> (7 - ((first + i) & 7))) & 1 else -scale


def pack_levels(v: Tensor, levels: int, bits: int, bucket: int, key: int) -> tuple[Tensor, Tensor]:
    """Return QSGD's codes, uint8[ceil(d bits / 8)], and each bucket's norm; bits at most 8. See `compress.quantize`."""
    d = len(v)
    out = torch.empty(-(-d * bits // 8), dtype=torch.uint8)
    norms = torch.empty(-(-d // bucket), dtype=v.dtype)
    a, b, o, s = v.numpy(), _bits(v), out.numpy(), norms.numpy()
    mask = b.dtype.type(_MAGNITUDE[v.dtype])

    def part(start: int, stop: int) -> None:
        places, buckets = slice(start * bits // 8, -(-stop * bits // 8)), slice(start // bucket, -(-stop // bucket))
        _pack_levels(
            a[start:stop], b[start:stop], mask, levels, bits, bucket, np.uint32(key), start, o[places], s[buckets]
        )

    _in_parts(d, 8 * bucket, part)
    return out, norms


@_compile
def _pack_levels(
    v: _Array,
    bits_of_v: _Array,
    mask: int,
    levels: int,
    bits: int,
    bucket: int,
    key: np.uint32,
    offset: int,
    out: _Array,
    norms: _Array,
) -> None:
    # Loops run over slices: numba then knows that no index is negative, and makes vector code of them.
    unit, codes = np.empty(bucket, v.dtype), np.zeros(8 * bucket, np.uint8)  # eight buckets end at a byte
    for group in range(0, len(v), 8 * bucket):
        held = v[group : group + 8 * bucket]
        for start in range(0, len(held), bucket):
            x, c = held[start : start + bucket], codes[start : start + bucket]
            x_bits, place = bits_of_v[group + start : group + start + len(x)], offset + group + start
            norms[(group + start) // bucket] = _levels_of(
                x, x_bits, mask, unit[: len(x)], v.dtype.type(levels), key, place, c
            )
        codes[len(held) :] = 0
        _pack_codes(codes[: -(-len(held) // 8) * 8], bits, out[group * bits // 8 :])


@_compile
def _levels_of(
    x: _Array, bits: _Array, mask: int, unit: _Array, top: float, key: np.uint32, offset: int, codes: _Array
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
        chance = x.dtype.type(np.int32(_hash(np.uint32(offset + i), key) >> np.uint32(8))) * x.dtype.type(2.0**-24)
        level = min(top, np.floor(unit[i] / divisor * top + chance))
        codes[i] = np.uint8(np.int32((-level if x[i] < zero else level) + top))
    return norm * largest


@_compile_sum
def _sum_of_squares(v: _Array) -> float:
    s = 0.0
    for i in range(len(v)):
        s += np.float64(v[i]) * np.float64(v[i])
    return s


@_compile
def _pack_codes(codes: _Array, bits: int, out: _Array) -> None:
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(8):
            word |= np.uint64(codes[8 * k + j]) << np.uint64(bits * (7 - j))
        for j in range(min(bits, len(out) - k * bits)):
            out[k * bits + j] = np.uint8((word >> np.uint64(8 * (bits - 1 - j))) & np.uint64(255))


@_compile
def _hash(x: np.uint32, key: np.uint32) -> np.uint32:
    # Products and sums of 32 bits are taken modulo 2^32 one by one; numba would widen them.
    h = np.uint32(np.uint32(x * np.uint32(0x9E3779B1)) + key)
    h = np.uint32(h ^ np.uint32(h >> np.uint32(16)))
    h = np.uint32(h * np.uint32(0x7FEB352D))
    h = np.uint32(h ^ np.uint32(h >> np.uint32(15)))
    h = np.uint32(h * np.uint32(0x846CA68B))
    return np.uint32(h ^ np.uint32(h >> np.uint32(16)))


def add_levels(packed: Tensor, levels: int, bits: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> None:
    """Add alpha (code - levels) norm to out, float[d], for the codes and norms of `pack_levels`."""
    p, s, o = packed.numpy(), norms.numpy(), out.numpy()
    scale = o.dtype.type(alpha)

    def part(start: int, stop: int) -> None:
        _add_levels(p[start * bits // 8 :], levels, bits, bucket, s[start // bucket :], o[start:stop], scale)

    _in_parts(len(out), 8 * bucket, part)


@_compile
def _add_levels(packed: _Array, levels: int, bits: int, bucket: int, norms: _Array, out: _Array, alpha: float) -> None:
    codes = np.empty(8 * bucket, np.uint8)
    for group in range(0, len(out), 8 * bucket):
        held = out[group : group + 8 * bucket]
        _unpack_codes(packed[group * bits // 8 :], bits, codes[: -(-len(held) // 8) * 8])
        for start in range(0, len(held), bucket):
            x, c, norm = held[start : start + bucket], codes[start : start + bucket], norms[(group + start) // bucket]
            for i in range(len(x)):
                x[i] += alpha * (out.dtype.type(np.int32(c[i]) - np.int32(levels)) * norm)


@_compile
def _unpack_codes(packed: _Array, bits: int, codes: _Array) -> None:
    mask = np.uint64((1 << bits) - 1)
    for k in range(len(codes) // 8):
        word = np.uint64(0)
        for j in range(bits):  # the last word may be cut short
            place = k * bits + j
            word = (word << np.uint64(8)) | (np.uint64(packed[place]) if place < len(packed) else np.uint64(0))
        for j in range(8):
            codes[8 * k + j] = np.uint8((word >> np.uint64(bits * (7 - j))) & mask)


# --- whole numbers of any width


def pack_numbers(numbers: Tensor, width: int) -> Tensor:
    """Pack int64[n] numbers below 2^width, width at most 56, most significant bit first, uint8[ceil(n width / 8)]."""
    out = torch.empty(-(-len(numbers) * width // 8), dtype=torch.uint8)
    _pack_numbers(numbers.numpy(), width, out.numpy())
    return out


@_compile
def _pack_numbers(numbers: _Array, width: int, out: _Array) -> None:
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


@_compile
def _unpack_numbers(packed: _Array, width: int, out: _Array) -> None:
    mask = (np.uint64(1) << np.uint64(width)) - np.uint64(1)
    accumulator, held, place = np.uint64(0), 0, 0
    for i in range(len(out)):
        while held < width:
            accumulator = (accumulator << np.uint64(8)) | np.uint64(packed[place])
            held += 8
            place += 1
        held -= width
        out[i] = np.int64((accumulator >> np.uint64(held)) & mask)
