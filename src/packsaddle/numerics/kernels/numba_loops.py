"""Compiled loops for sparse vectors (permutations, selection by magnitude) and checked sums."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import (
    BLOCK,
    Array,
    bits_of,
    compiled_fma,
    compiled_loop,
    in_parts,
    scalar,
)


def feistel_sample(n: int, k: int, bits: int, keys: list[int]) -> Tensor:
    """Return the first k values, int64[k], of the keyed permutation of [0, n) that `seeds.sample_without_replacement`
    describes, before its rotation. `keys` contains the keys of the Feistel rounds, and after them the key of the
    rotation, which is not used here. `bits` is the number of bits of n - 1."""
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
    """Return the indices of the elements of v, float[n], whose magnitude is at least `threshold`. The indices are
    int64[...], in increasing order. The threshold is an integer, and the magnitudes are compared with it as integers.
    `expected` is an estimate of the number of indices. See `compressors.selection.reaching`."""
    bits, mask = bits_of(v)
    limit = bits.dtype.type(threshold)

    def part(start: int, stop: int) -> Tensor:
        room = min(2 * (expected * (stop - start) // max(1, len(v))) + 16 * BLOCK, stop - start + BLOCK)
        while True:
            out = torch.empty(room, dtype=torch.int64)
            found = _select(bits[start:stop], limit, mask, start, out.numpy())
            if found + BLOCK <= room:
                return out[:found]
            room = found + BLOCK

    parts = in_parts(len(v), BLOCK, part)
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@compiled_loop
def _select(bits: Array, limit: int, mask: int, offset: int, out: Array) -> Any:
    """Write to `out` the indices of the magnitudes in `bits` that are at least `limit`, each increased by `offset`.
    Returns the number n of these magnitudes. If n + BLOCK is above len(out), `out` may be incomplete, and the caller
    must repeat the call with a longer `out`."""
    m: Any = 0
    full = len(bits) // BLOCK * BLOCK
    # Most blocks have no magnitude that reaches `limit`. Count first, and write indices only if the count is not 0.
    for s in range(0, full, BLOCK):
        block: Array = bits[s : s + BLOCK]
        c: Any = np.int32(0)
        for i in range(BLOCK):  # numba vectorizes this loop
            c += np.int32((block[i] & mask) >= limit)
        if c > 0:
            # If `out` is full, only count, so that the caller can allocate enough.
            if m + BLOCK > len(out):
                m += c
                continue
            n: Any = m
            # No branches: write every index to place n, and increment n only if the magnitude is at least `limit`.
            for i in range(BLOCK):
                out[n] = offset + s + i
                n += np.int64((block[i] & mask) >= limit)
            m = n
    # Search the shorter last block.
    for i in range(full, len(bits)):
        if (bits[i] & mask) >= limit:
            if m < len(out):
                out[m] = offset + i
            m += 1
    return m


def largest_of_chunks(v: Tensor, chunk: int, kept: int, kept_of_last: int) -> Tensor:
    """Return the indices of the `kept` largest magnitudes in each run of `chunk` elements of v, float[d]. The indices
    are int64[...], in increasing order. If the last run is shorter, `kept_of_last` of its indices are returned. Among
    equal magnitudes, the first are selected."""
    d = len(v)
    out = torch.empty(d // chunk * kept + (kept_of_last if d % chunk else 0), dtype=torch.int64)
    (bits, mask), o = bits_of(v), out.numpy()
    step = 1 << (22 if v.dtype == torch.float32 else 51)

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
        # Rank only magnitudes above a limit just below the previous chunk's threshold. If they are too few, rank all.
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
    """Write to `found` the indices of the magnitudes in `bits` that are at least `limit`, and return their number.
    `found` must have one element more than `bits`."""
    m: Any = 0
    for i in range(len(bits)):
        found[m] = i
        m += np.int64((bits[i] & mask) >= limit)
    return m


@compiled_loop
def _least_of_largest(magnitudes: Array, k: int, step: int) -> Any:
    """Return a threshold that exactly k of the integers in `magnitudes` reach. If ties make that impossible, return the
    k-th largest integer."""
    most = magnitudes.dtype.type(0)
    for i in range(len(magnitudes)):
        most = max(most, magnitudes[i])
    high = np.int64(most)
    low, reached = high, _count_reaching(magnitudes, most)
    # Decrease `low` until k or more magnitudes reach it. Fewer than k reach `high`, unless `high` is the largest one.
    while reached < k:
        high, low = low, max(np.int64(0), low - step)
        step = min(2 * step, 1 << 61)
        reached = _count_reaching(magnitudes, magnitudes.dtype.type(low))
    # Bisect: k or more magnitudes reach `low`, and fewer reach `high`. Stop when exactly k reach `low`, or when `low`
    # is the k-th largest magnitude.
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
    """Write the indices of k magnitudes to `out`, in increasing order. They are the indices of all magnitudes above
    `limit`, and of as many of the first magnitudes equal to `limit` as are needed. The index of magnitude number i is
    found[i] + `offset`."""
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
    """Compute two histograms of v, float[n], whose bins are the values of the first `first_bits` bits of a magnitude.
    The first, int64[bins], contains the number of elements x in each bin. The second, float64[bins], contains the sum
    of (x / top)^2 over the elements x in each bin."""
    bits, mask = bits_of(v)
    shift = 8 * v.element_size() - 1 - first_bits

    def part(start: int, stop: int) -> tuple[Array, Array]:
        # Count in four tables, so that consecutive increments of the same bin are independent.
        counts, energy = np.zeros((4, 1 << first_bits), np.int64), np.zeros((4, 1 << first_bits))
        _histogram(v.numpy()[start:stop], bits[start:stop], mask, shift, top, counts, energy)
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
    """Add alpha * more to out, float[n], in place, for each (out, more, alpha) in `sums`. Additions stop when the sum
    of the squares of the results overflows.

    Returns the ranges of elements to which the additions were completed, and the sum of the squares over these ranges,
    or infinity if the additions were stopped. A range is (index in `sums`, start, stop).
    """
    added, total = [], 0.0
    # Long vectors are divided among threads. If a sum of squares overflows, the caller undoes the additions in `added`.
    for i, (out, more, alpha) in enumerate(sums):
        for start, stop, squares in _in_threads(out.numpy(), more.numpy(), alpha):
            added.append((i, start, stop))
            total += squares
        if total == np.inf:
            break
    return added, total


def _in_threads(out: Array, more: Array, alpha: float) -> list[tuple[int, int, float]]:
    factor = scalar(alpha, out)

    def part(start: int, stop: int) -> tuple[int, int, float]:
        added, squares = _add_finite(out[start:stop], more[start:stop], factor)
        return start, start + added, squares

    return in_parts(len(out), _LINE, part)


_LINE = 256  # elements added at a time, few enough that they stay in the cache


@compiled_fma
def _add_finite(out: Array, more: Array, factor: Any) -> Any:
    total = 0.0
    unchanged = np.empty(_LINE, out.dtype)
    for start in range(0, len(out), _LINE):
        o, m = out[start : start + _LINE], more[start : start + _LINE]
        before = unchanged[: len(o)]
        squares = o.dtype.type(0)
        for i in range(len(o)):
            x = o[i] + factor * m[i]
            before[i] = o[i]
            squares += x * x
            o[i] = x
        if not np.isfinite(squares):
            o[:] = before
            return start, np.inf
        total += squares
    return len(out), total
