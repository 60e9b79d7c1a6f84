"""Compiled loops of values rounded to a sign and a level of their block ("int1", "int2", "int3")."""

import numpy as np
import torch
from torch import Tensor

from packsaddle.numerics.kernels.numba_codes import pack_codes, unpack_codes
from packsaddle.numerics.kernels.numba_common import Array, check_room, compiled_loop, compiled_sum, in_parts


def pack_levels_of_blocks(values: Tensor, halvings: int, block: int) -> tuple[Tensor, Tensor]:
    """Encode values, float[k], in `halvings` + 1 bits each; return the packed codes, uint8[...], and the levels of each
    block of `block` values, a multiple of 8, float64[blocks, 2^halvings]. See `compressors.values`."""
    k, bits = len(values), halvings + 1
    packed = torch.empty(-(-k * bits // 8), dtype=torch.uint8)
    levels = torch.empty(-(-k // block), 1 << halvings, dtype=torch.float64)
    v, p, of_blocks = values.numpy(), packed.numpy(), levels.numpy()

    def part(start: int, stop: int) -> None:
        coded = p[start * bits // 8 : -(-stop * bits // 8)]
        _pack_levels_of_blocks(v[start:stop], halvings, block, coded, of_blocks[start // block :])

    in_parts(k, block, part)
    return packed, levels


@compiled_loop
def _pack_levels_of_blocks(v: Array, halvings: int, block: int, packed: Array, levels: Array) -> None:
    magnitudes, codes, means = np.empty(block), np.empty(block, np.uint8), np.empty(1 << halvings)
    for start in range(0, len(v), block):
        x = v[start : start + block]
        m, c = magnitudes[: len(x)], codes[: len(x)]
        codes[:] = 0
        for i in range(len(x)):
            m[i] = abs(np.float64(x[i]))
        # Split each set of magnitudes at its mean: a code gets one more bit.
        for halving in range(halvings):
            for code in range(1 << halving):
                means[code] = _mean_of(m, c, code)
            for i in range(len(x)):
                c[i] = np.uint8(2 * c[i] + np.uint8(m[i] > means[c[i]]))
        for code in range(1 << halvings):
            levels[start // block, code] = _mean_of(m, c, code)
        for i in range(len(x)):
            c[i] |= np.uint8(np.uint8(x[i] < 0) << halvings)
        pack_codes(codes[: -(-len(x) // 8) * 8], halvings + 1, packed[start * (halvings + 1) // 8 :])


@compiled_sum
def _mean_of(magnitudes: Array, codes: Array, code: int) -> float:
    """Return the mean of the magnitudes that have this code, 0 if there are none."""
    s, n = 0.0, 0.0
    for i in range(len(magnitudes)):
        is_member = codes[i] == code
        s += magnitudes[i] if is_member else 0.0
        n += np.float64(is_member)
    return s / max(n, 1.0)


def unpack_levels_of_blocks(packed: Tensor, k: int, halvings: int, block: int, levels: Tensor) -> Tensor:
    """Decode `pack_levels_of_blocks`: return the values, float[k], in the type of `levels`, float[...]."""
    check_room("codes", packed, -(-k * (halvings + 1) // 8))
    check_room("levels", levels, -(-k // block) << halvings)
    out, bits = torch.empty(k, dtype=levels.dtype), halvings + 1
    p, of_blocks, o = packed.numpy(), levels.view(-1, 1 << halvings).numpy(), out.numpy()

    def part(start: int, stop: int) -> None:
        _unpack_levels_of_blocks(p[start * bits // 8 :], halvings, block, of_blocks[start // block :], o[start:stop])

    in_parts(k, block, part)
    return out


@compiled_loop
def _unpack_levels_of_blocks(packed: Array, halvings: int, block: int, levels: Array, out: Array) -> None:
    codes, signed = np.empty(block, np.uint8), np.empty(2 << halvings, out.dtype)
    for start in range(0, len(out), block):
        x = out[start : start + block]
        unpack_codes(packed[start * (halvings + 1) // 8 :], halvings + 1, codes[: -(-len(x) // 8) * 8])
        for code in range(1 << halvings):
            signed[code] = levels[start // block, code]
            signed[(1 << halvings) + code] = -levels[start // block, code]
        for i in range(len(x)):
            x[i] = signed[codes[i]]
