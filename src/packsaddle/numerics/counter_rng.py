"""Random numbers that are functions of a counter and a key: any stretch of a sequence, on any device, in any order.

A number does not depend on what was drawn before it, so a vector's noise needs no memory beside the vector.
Words are 32 bits of the counter, mixed twice (a multiply-xorshift permutation with low bias, found by Chris Wellons's
search, https://github.com/skeeto/hash-prospector) with a key added before each, so that sequences of different
keys are not stretches of one. Normal numbers are Box and Muller's, in single precision. A sequence repeats after
2^32 words, or 2^33 normal numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from packsaddle.numerics.kernels import kernel
from packsaddle.numerics.seeds import Stream, mix

_PAIRS = 1024  # the normal numbers 2048 c + i and 2048 c + 1024 + i, i < 1024, come from counter 1024 c + i
_SLAB = 64 * 2 * _PAIRS  # numbers made at a time, so that scratch memory does not grow


class Keys(NamedTuple):
    """Three 32-bit keys."""

    first: int
    second: int
    third: int


def keys(seed: int, step: int, stream: Stream) -> Keys:
    """Return the keys of (seed, step, stream)."""
    return Keys(*(mix(seed, step, int(stream), i) >> 32 for i in range(3)))


def words(counters: Tensor, key: Keys) -> Tensor:
    """Return 32 random bits for each counter, int32[n] for int32[n]."""
    return _mixed(_mixed(counters * _signed(0x9E3779B1) + _signed(key.first)) + _signed(key.second))


def _mixed(h: Tensor) -> Tensor:
    """Permute 32-bit words, in place; products and sums wrap, and shifts are masked to be logical."""
    h ^= (h >> 16) & 0xFFFF
    h *= _signed(0x7FEB352D)
    h ^= (h >> 15) & 0x1FFFF
    h *= _signed(0x846CA68B)
    h ^= (h >> 16) & 0xFFFF
    return h


def _signed(word: int) -> int:
    """Reinterpret 32 unsigned bits as the int32 that torch accepts."""
    return word - (1 << 32) if word >= 1 << 31 else word


def add_gaussians(out: Tensor, scale: float, key: Keys, start: int = 0) -> None:
    """Add scale times the standard normal numbers `start`, start + 1, ... of a key to out, float[n], in place.

    The same on every device, up to the last digits of a logarithm and a sine.
    """
    if loop := kernel("add_gaussians", out):
        loop(out, scale, key, start)
        return
    for slab in torch.split(out, _SLAB):
        first = start // (2 * _PAIRS)
        numbers = _gaussians(first, -(-(start + len(slab)) // (2 * _PAIRS)), key, out.device)
        skipped = start - first * 2 * _PAIRS
        slab.add_(numbers[skipped : skipped + len(slab)].to(out.dtype), alpha=scale)
        start += len(slab)


def add_cell_gaussians(out: Tensor, scales: Tensor, key: Keys) -> None:
    """Add standard normal numbers of a key to out, float[m b], those of cell i times scales[i], float[m], in place."""
    b = len(out) // max(1, len(scales))
    if (loop := kernel("add_cell_gaussians", out, scales)) and 2 * _PAIRS % max(1, b) == 0:
        loop(out, scales, key)
        return
    numbers = torch.zeros_like(out)
    add_gaussians(numbers, 1.0, key)
    out.view(-1, b).add_(numbers.view(-1, b).mul_(scales[:, None]))


def _gaussians(first: int, last: int, key: Keys, device: torch.device) -> Tensor:
    """Return the numbers of chunks first, ..., last - 1, float32[2048 (last - first)]."""
    counters = torch.arange(first * _PAIRS, last * _PAIRS, device=device).to(torch.int32)
    hashed = _mixed(counters * _signed(0x9E3779B1) + _signed(key.first))
    radial, angular = _mixed(hashed + _signed(key.second)), _mixed(hashed + _signed(key.third))
    u = ((radial >> 1) & 0x7FFFFFFF).to(torch.float32).add_(0.5).mul_(2.0**-31)
    radius = u.log_().mul_(-2).sqrt_()
    # 30 bits for an angle of less than an eighth of a turn, one to mirror it, one to swap axes.
    angle = ((angular & 0x3FFFFFFF) - (1 << 29)).to(torch.float32).mul_(math.pi * 2.0**-31)
    sine, cosine = angle.sin().mul_(radius), angle.cos_().mul_(radius)
    cosine = torch.where(angular < 0, -cosine, cosine)
    swap = angular & (1 << 30) != 0
    pairs = torch.stack([torch.where(swap, sine, cosine), torch.where(swap, cosine, sine)])
    return pairs.view(2, -1, _PAIRS).transpose(0, 1).reshape(-1)
