"""Compiled loops that encode values in 2 or 4 bits each, and decode them. See `compressors.values`.

The values are divided into blocks of consecutive values. With 2 bits, a value is encoded as its sign and the index of
one of two levels of its block, which are means of magnitudes. With 4 bits, a value is rounded to a multiple of a
seventh of the largest magnitude of its block (the scale).
"""

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_common import (
    Array,
    check_room,
    compiled_loop,
    compiled_sum,
    in_parts,
    scalar,
    sum_of_magnitudes,
)


def pack_two_levels(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Encode k values, float[k], in two bits each (see `compressors.values`). A block has `block` values, a multiple of
    4. Returns the packed codes of the values, uint8[ceil(k / 4)], and the levels of each block, float64[blocks, 2]."""
    packed = torch.empty(-(-len(values) // 4), dtype=torch.uint8)
    levels = torch.empty(-(-len(values) // block), 2, dtype=torch.float64)
    v, p, of_blocks = values.numpy(), packed.numpy(), levels.numpy()

    def part(start: int, stop: int) -> None:
        _pack_two_levels(v[start:stop], block, p[start // 4 :], of_blocks[start // block :])

    in_parts(len(v), block, part)
    return packed, levels


@compiled_loop
def _pack_two_levels(v: Array, block: int, packed: Array, levels: Array) -> None:
    split = np.empty(1, v.dtype)
    for start in range(0, len(v), block):
        x, of_block = v[start : start + block], levels[start // block]
        mean = sum_of_magnitudes(x) / len(x)
        # Round the mean down to float32: the rounded mean separates the same values, and is faster to compare with
        # them.
        split[0] = mean
        if split[0] > mean:
            split.view(np.int32)[0] -= 1
        low, high, above = _sums_around(x, split[0])
        of_block[0], of_block[1] = low / max(len(x) - above, 1.0), high / max(above, 1.0)
        _pack_two_bits(x, split[0], packed[start // 4 : -(-(start + len(x)) // 4)])


@compiled_sum
def _sums_around(x: Array, split: float) -> tuple[float, float, float]:
    """Return three numbers for the vector x: the sum of the magnitudes up to `split`, the sum of the larger magnitudes,
    and the number of the larger magnitudes."""
    low, high, above = 0.0, 0.0, 0.0
    for i in range(len(x)):
        m = abs(x[i])
        low += np.float64(0.0 if m > split else m)
        high += np.float64(m if m > split else 0.0)
        above += 1.0 if m > split else 0.0
    return low, high, above


@compiled_loop
def _pack_two_bits(x: Array, split: float, packed: Array) -> None:
    """Pack two bits for each value in x: the first bit is 1 if the value is negative, and the second bit is 1 if the
    value's magnitude exceeds `split`. Writes to `packed`."""
    for j in range(len(x) // 4):
        byte = np.uint8(0)
        for i in range(4):
            a = x[4 * j + i]
            byte = np.uint8((byte << 2) | (np.uint8(a < 0) << 1) | np.uint8(abs(a) > split))
        packed[j] = byte
    if len(x) % 4:
        byte = np.uint8(0)
        for i in range(len(x) // 4 * 4, len(x)):
            byte |= np.uint8(((np.uint8(x[i] < 0) << 1) | np.uint8(abs(x[i]) > split)) << (6 - 2 * (i % 4)))
        packed[len(x) // 4] = byte


def add_two_levels(packed: Tensor, block: int, levels: Tensor, out: Tensor) -> None:
    """Decode the output of `pack_two_levels`, and add the values to out, float[k], in place. `levels` must have the
    dtype of out."""
    check_room("codes", packed, -(-len(out) // 4))
    check_room("levels", levels, 2 * -(-len(out) // block))
    p, of_blocks, o = packed.numpy(), levels.view(-1, 2).numpy(), out.numpy()
    in_parts(len(o), block, lambda a, b: _add_two_levels(p[a // 4 :], block, of_blocks[a // block :], o[a:b]))


@compiled_loop
def _add_two_levels(packed: Array, block: int, levels: Array, out: Array) -> None:
    for start in range(0, len(out), block):
        x, low, high = out[start : start + block], levels[start // block, 0], levels[start // block, 1]
        codes = packed[start // 4 :][: -(-len(x) // 4)]
        for j in range(len(x) // 4):
            for i in range(4):
                code = codes[j] >> (6 - 2 * i)
                m = high if code & 1 else low
                x[4 * j + i] += -m if code & 2 else m
        for i in range(len(x) // 4 * 4, len(x)):
            code = codes[i >> 2] >> (6 - 2 * (i & 3))
            m = high if code & 1 else low
            x[i] += -m if code & 2 else m


def pack_four_bits(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Round values, float[k], to multiples of a seventh of their block's scale, and pack them in four bits each.

    The multiples are from -7 to 7, and 8 is added to each before it is packed. `scales`, float[blocks], has the scale
    of each block of `block` values, in the dtype of the values. `block` must be even. Returns uint8[ceil(k / 2)].
    """
    check_room("scales", scales, -(-len(values) // block))
    packed = torch.empty(-(-len(values) // 2), dtype=torch.uint8)
    v, s, p = values.numpy(), scales.numpy(), packed.numpy()
    in_parts(len(v), block, lambda a, b: _pack_four_bits(v[a:b], s[a // block :], block, p[a // 2 :]))
    return packed


@compiled_loop
def _pack_four_bits(v: Array, scales: Array, block: int, packed: Array) -> None:
    codes, seven = np.empty(block + 1, np.uint8), v.dtype.type(7)
    for start in range(0, len(v), block):
        x, scale = v[start : start + block], scales[start // block]
        codes[len(x)] = 0  # the last block may end within a byte
        for i in range(len(x)):
            unit = x[i] / scale if scale > 0 else x[i]
            codes[i] = np.uint8(np.int32(min(max(np.rint(unit * seven), -seven), seven)) + 8)
        for j in range((len(x) + 1) // 2):
            packed[start // 2 + j] = (codes[2 * j] << 4) | codes[2 * j + 1]


def has_zero_code(packed: Tensor) -> bool:
    """Return True if one of the four-bit codes in `packed`, uint8[n], two in each byte, is 0."""
    return bool(_has_zero_code(packed.numpy()))


@compiled_loop
def _has_zero_code(packed: Array) -> bool:
    found = False
    for code in packed:  # without a branch, so that many bytes are checked by one instruction
        found |= (code < 16) | (code & 15 == 0)
    return found


def add_four_bits(packed: Tensor, block: int, scales: Tensor, out: Tensor, alpha: float) -> None:
    """Decode the output of `pack_four_bits`, and add alpha times the values to out, float[k], in place. `scales` must
    have the dtype of out."""
    check_room("codes", packed, -(-len(out) // 2))
    check_room("scales", scales, -(-len(out) // block))
    p, s, o = packed.numpy(), scales.numpy(), out.numpy()
    times = scalar(alpha, o)
    in_parts(len(o), block, lambda a, b: _add_four_bits(p[a // 2 :], s[a // block :], block, o[a:b], times))


@compiled_loop
def _add_four_bits(packed: Array, scales: Array, block: int, out: Array, alpha: float) -> None:
    decoded = np.empty(16, out.dtype)
    for start in range(0, len(out), block):
        x, codes = out[start : start + block], packed[start // 2 :]
        for code in range(16):
            decoded[code] = out.dtype.type(code - 8) / out.dtype.type(7) * scales[start // block] * alpha
        for j in range(len(x) // 2):
            x[2 * j] += decoded[codes[j] >> 4]
            x[2 * j + 1] += decoded[codes[j] & 15]
        if len(x) % 2:
            x[-1] += decoded[codes[len(x) // 2] >> 4]
