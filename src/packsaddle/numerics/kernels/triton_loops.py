"""Triton versions of the compiled loops, for CUDA. They are launched on the current stream without synchronization.

Each has the arguments and results of the numba loop of the same name. There is no loop that selects by magnitude, since
torch.topk is a radix select. There is also none for cells (runs of coordinates), since torch gathers and adds them by
index. With TRITON_INTERPRET=1 the loops run on CPU tensors.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_AT_ONCE = 1024  # elements per Triton program
_PAIRS = 1024  # counters of a chunk of normal numbers, as in `numerics.seeds`
_BYTES = 128  # packed bytes, or groups of eight codes, per program


@triton.jit
def _mixed(h):  # type: ignore[no-untyped-def]
    h = h ^ (h >> 16)
    h = h * 0x7FEB352D
    h = h ^ (h >> 15)
    h = h * 0x846CA68B
    return h ^ (h >> 16)


def add_gaussians(out: Tensor, scale: float, keys: tuple[int, int, int], start: int) -> None:
    first = start // (2 * _PAIRS)
    chunks = -(-(start + len(out)) // (2 * _PAIRS)) - first
    words = [key - (1 << 32) if key >= 1 << 31 else key for key in keys]  # reinterpret as int32
    _launch(_gaussians, chunks, out, len(out), scale, *words, first, start, PAIRS=_PAIRS)


@triton.jit
def _gaussians(out, n, scale, k1, k2, k3, first_chunk, start, PAIRS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    chunk = first_chunk + tl.program_id(0)
    i = tl.arange(0, PAIRS)
    counter = (chunk * PAIRS + i).to(tl.uint32)
    h = _mixed(counter * 0x9E3779B1 + k1.to(tl.uint32))
    radial, angular = _mixed(h + k2.to(tl.uint32)), _mixed(h + k3.to(tl.uint32))
    radius = tl.sqrt(-2.0 * tl.log(((radial >> 1).to(tl.float32) + 0.5) * 4.656612873077393e-10))
    angle = ((angular & 0x3FFFFFFF).to(tl.int32) - 536870912).to(tl.float32) * 1.4629180792671596e-09
    cosine, sine = tl.cos(angle) * radius, tl.sin(angle) * radius
    cosine = tl.where((angular >> 31) == 1, -cosine, cosine)
    swap = ((angular >> 30) & 1) == 1
    place = chunk.to(tl.int64) * 2 * PAIRS - start + i
    _add(out, place, tl.where(swap, sine, cosine) * scale, n)
    _add(out, place + PAIRS, tl.where(swap, cosine, sine) * scale, n)


@triton.jit
def _add(out, place, values, n):  # type: ignore[no-untyped-def]
    inside = (place >= 0) & (place < n)
    old = tl.load(out + place, mask=inside, other=0.0)
    tl.store(out + place, old + values.to(old.dtype), mask=inside)


def pack_signs(v: Tensor) -> Tensor:
    out = torch.empty(-(-len(v) // 8), dtype=torch.uint8, device=v.device)
    _launch(_pack_signs, -(-len(out) // _BYTES), v, out, len(v), len(out), SIZE=_BYTES)
    return out


@triton.jit
def _pack_signs(v, out, d, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    byte, bit = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE), tl.arange(0, 8)
    place = byte[:, None] * 8 + bit[None, :]
    positive = (tl.load(v + place, mask=place < d, other=-1.0) >= 0).to(tl.int32)
    tl.store(out + byte, tl.sum(positive << (7 - bit)[None, :], axis=1).to(tl.uint8), mask=byte < n)


def add_signs(packed: Tensor, sizes: Sequence[int], scales: Tensor, out: Tensor) -> None:
    first = 0
    for run, size in enumerate(sizes):
        at = (packed, first, scales[run:], out[first : first + size], size)
        _launch(_add_signs, -(-size // _AT_ONCE), *at, SIZE=_AT_ONCE)
        first += size


@triton.jit
def _add_signs(packed, first, scale, out, n, SIZE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    place, value = first + i, tl.load(scale)
    byte = tl.load(packed + (place >> 3), mask=i < n, other=0).to(tl.int32)
    _add(out, i, tl.where((byte >> (7 - (place & 7))) & 1 == 1, value, -value), n)


def pack_levels(v: Tensor, levels: int, bits: int, bucket: int, keys: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    d = len(v)
    norms = torch.empty(-(-d // bucket), dtype=v.dtype, device=v.device)
    codes = torch.zeros(-(-d // 8) * 8, dtype=torch.uint8, device=v.device)
    words = [key - (1 << 32) if key >= 1 << 31 else key for key in keys[:2]]
    _launch(_codes, len(norms), v, codes, norms, d, levels, bucket, *words, SIZE=triton.next_power_of_2(bucket))
    out = torch.empty(-(-d * bits // 8), dtype=torch.uint8, device=v.device)
    _launch(_pack_codes, -(-len(codes) // (8 * _BYTES)), codes, out, len(codes) // 8, len(out), BITS=bits, SIZE=_BYTES)
    return out, norms


@triton.jit
def _codes(v, codes, norms, d, levels, bucket, k1, k2, SIZE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    b, i = tl.program_id(0), tl.arange(0, SIZE)
    place = b.to(tl.int64) * bucket + i
    inside = (i < bucket) & (place < d)
    x = tl.load(v + place, mask=inside, other=0.0)
    spoiled = tl.max((x - x != 0).to(tl.int32)) == 1  # True if the bucket has a NaN or infinity
    largest = tl.max(tl.abs(x))
    unit = tl.abs(x) / tl.where(largest > 0, largest, 1.0)
    norm = tl.sqrt(tl.sum(unit * unit))
    h = _mixed(_mixed(place.to(tl.uint32) * 0x9E3779B1 + k1.to(tl.uint32)) + k2.to(tl.uint32))
    chance = (h >> 8).to(tl.float32) * 5.9604644775390625e-08
    level = tl.minimum(tl.floor(unit / tl.where(norm > 1, norm, 1.0) * levels + chance), levels * 1.0)
    code = tl.where(spoiled, 0.0, tl.where(x < 0, -level, level)) + levels
    tl.store(codes + place, code.to(tl.uint8), mask=inside)
    tl.store(norms + b, tl.where(spoiled, float("nan"), norm * largest))


@triton.jit
def _pack_codes(codes, out, groups, n, BITS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    group, j = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE), tl.arange(0, 8)
    loaded = tl.load(codes + group[:, None] * 8 + j[None, :], mask=(group < groups)[:, None], other=0).to(tl.int64)
    word = tl.sum(loaded << (BITS * (7 - j))[None, :].to(tl.int64), axis=1)
    for byte in tl.static_range(BITS):
        place = group * BITS + byte
        tl.store(
            out + place, ((word >> (8 * (BITS - 1 - byte))) & 255).to(tl.uint8), mask=(group < groups) & (place < n)
        )


def add_levels(packed: Tensor, levels: int, bits: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> None:
    """Add alpha * (code - levels) * norm to each element of out, float[d], in place. `packed`, uint8[...], has a code
    of `bits` bits for each element, and `norms` the norm of each bucket of `bucket` elements. Codes above 2 * levels
    are not rejected, since a check would synchronize; they decode to at most 3 * levels."""
    programs, sizes = -(-len(out) // _AT_ONCE), (len(out), len(packed))
    _launch(_add_levels, programs, packed, norms, out, alpha, levels, bucket, *sizes, BITS=bits, SIZE=_AT_ONCE)


@triton.jit
def _add_levels(packed, norms, out, alpha, levels, bucket, d, n, BITS: tl.constexpr, SIZE: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    i = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    bit = i * BITS
    byte = bit >> 3
    high = tl.load(packed + byte, mask=i < d, other=0).to(tl.int32)
    low = tl.load(packed + byte + 1, mask=(i < d) & (byte + 1 < n), other=0).to(tl.int32)
    code = (((high << 8) | low) >> (16 - BITS - (bit & 7).to(tl.int32))) & ((1 << BITS) - 1)
    norm = tl.load(norms + i // bucket, mask=i < d, other=0.0)
    _add(out, i, ((code - levels).to(norm.dtype) * alpha) * norm, d)  # this order of factors cannot overflow


def _launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    if programs:
        kernel[(programs,)](*args, **constants)
