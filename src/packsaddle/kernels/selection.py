"""Choosing by magnitude."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from packsaddle.kernels.parts import BLOCK, MAGNITUDE, Array, bits_of, compiled_loop, in_parts


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
