"""Compiled loops of levels in Rice codes; see `compressors.levels`, which has the same in torch."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_codes import pack_codes, unpack_codes
from packsaddle.numerics.kernels.numba_common import Array, check_room, compiled_loop, scalar

_GROUP = 4096  # coordinates that are looked at together, a multiple of 8


def rice_levels(packed: Tensor, d: int, top: int, bits: int, b: int, unary_bits: int) -> Tensor:
    """Return the Rice codes of d levels, which `pack_levels` packed: quotients in unary, then remainders, uint8[...].

    `unary_bits` is the sum of all quotients, plus d.
    """
    unary = torch.zeros(-(-unary_bits // 8), dtype=torch.uint8)
    rest = torch.empty(-(-d * b // 8), dtype=torch.uint8)
    _rice_levels(packed.numpy(), d, top, bits, b, unary.numpy(), rest.numpy())
    return torch.cat([unary, rest])


@compiled_loop
def _rice_levels(packed: Array, d: int, top: int, bits: int, b: int, unary: Array, rest: Array) -> None:
    codes, remainders = np.empty(_GROUP, np.uint8), np.empty(_GROUP, np.uint8)
    mask = np.int32((1 << b) - 1)
    bit: Any = 0
    for group in range(0, d, _GROUP):
        n = min(_GROUP, d - group)
        whole = -(-n // 8) * 8
        unpack_codes(packed[group * bits // 8 :], bits, codes[:whole])
        for i in range(n):
            level = np.int32(codes[i]) - np.int32(top)
            # 0, 1, -1, 2, -2, ... -> 0, 1, 2, 3, 4, ...: the quotient by 2^b in unary, zeros and a one.
            folded = 2 * level - 1 if level > 0 else -2 * level
            remainders[i] = np.uint8(folded & mask)
            bit += np.int64(folded >> b)
            unary[bit >> 3] |= np.uint8(128 >> (bit & 7))
            bit += 1
        # Remainders of b bits. Groups end at a byte; zeros fill the last one.
        remainders[n:whole] = 0
        if b:
            pack_codes(remainders[:whole], b, rest[group * b // 8 :])


def add_rice_levels(body: Tensor, top: int, b: int, bucket: int, norms: Tensor, out: Tensor, alpha: float) -> bool:
    """Add alpha level norm to out, float[d], for what `rice_levels` returned and a norm for each bucket.

    Returns False if others than d levels are coded, or if one is not from -top to top.
    """
    check_room("norms", norms, -(-len(out) // bucket))
    o = out.numpy()
    split = len(body) - -(-len(out) * b // 8)
    stream = body.numpy()
    return split >= 0 and bool(
        _add_rice_levels(stream[:split], stream[split:], top, b, bucket, norms.numpy(), o, scalar(alpha, o))
    )


@compiled_loop
def _add_rice_levels(
    unary: Array, rest: Array, top: int, b: int, bucket: int, norms: Array, out: Array, alpha: float
) -> bool:
    longest = np.int64((2 * top >> b) + 1)  # bits of a quotient
    size = 8 * bucket * max(1, _GROUP // (8 * bucket))  # whole buckets, whose remainders end at a byte
    remainders, quotients, levels = np.zeros(size, np.uint8), np.empty(size + 8, np.int32), np.empty(size, np.int32)
    ends = np.empty(9, np.int64)
    pending, byte_at, before = 0, 0, np.int64(-1)
    for group in range(0, len(out), size):
        n = min(size, len(out) - group)
        if b:
            unpack_codes(rest[group * b // 8 :], b, remainders[: -(-n // 8) * 8])
        # The quotients of this group, and up to seven of the next.
        while pending < n and byte_at < len(unary):
            if 8 * byte_at - before > longest:
                return False
            byte = unary[byte_at]
            ones: Any = 0
            for i in range(8):  # no branch to mispredict: where there is no one, what is written is written over
                ends[ones] = 8 * byte_at + i
                ones += np.int64((byte >> (7 - i)) & 1)
            byte_at += 1
            for i in range(ones):
                quotients[pending + i] = np.int32(ends[i] - before - 1)
                before = ends[i]
            pending += ones
        if pending < n:
            return False
        for i in range(n):
            folded = (quotients[i] << b) | np.int32(remainders[i])
            levels[i] = (folded + 1) >> 1 if folded & 1 else -(folded >> 1)
        largest = np.int32(0)
        for i in range(n):
            largest = max(largest, abs(levels[i]))
        if largest > top:
            return False
        for i in range(n, pending):
            quotients[i - n] = quotients[i]
        pending -= n
        for start in range(0, n, bucket):
            x, c = out[group + start : group + min(n, start + bucket)], levels[start : start + bucket]
            norm = norms[(group + start) // bucket]
            for i in range(len(x)):
                x[i] += (alpha * out.dtype.type(c[i])) * norm  # in this order: no overflow
    return pending == 0 and byte_at == len(unary)
