"""A keyed permutation of [0, n), see `seeds`."""

import numpy as np
import torch
from torch import Tensor

from packsaddle.kernels.parts import Array, compiled_loop


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
