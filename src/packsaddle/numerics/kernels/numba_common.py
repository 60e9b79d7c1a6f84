"""Shared helpers of compiled loops: compiler options, threads, and checks."""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numba
import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
BLOCK = 64  # elements per block in loops that select by magnitude
WORTH_THREADS = 1 << 18  # minimum number of elements per thread

compiled_loop = numba.njit(nogil=True, cache=True, error_model="numpy")
# Loops with this decorator may reorder their floating-point additions.
compiled_sum = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc"})
# Loops with this decorator may reorder their floating-point additions, and may use fused multiply-add, as torch.add
# does for `alpha`.
compiled_fma = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
T = TypeVar("T")


@compiled_sum
def sum_of_magnitudes(v: Array) -> float:
    s = 0.0
    for i in range(len(v)):
        s += abs(np.float64(v[i]))
    return s


def in_parts(n: int, multiple: int, work: Callable[[int, int], T]) -> list[T]:
    """Divide [0, n) into parts that start at multiples of `multiple`, and call work(start, stop) for each part
    [start, stop), in parallel threads. Returns the list of the results, in the order of the parts. Small ranges are not
    divided."""
    parts = max(1, min(torch.get_num_threads(), n // WORTH_THREADS))
    if parts == 1:
        return [work(0, n)]
    edges = [min(n, i * n // parts // multiple * multiple) for i in range(parts)] + [n]
    return list(_pool(parts).map(work, edges[:-1], edges[1:]))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="packsaddle")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork


def check_room(what: str, array: Tensor, least: int) -> None:
    """Raise ValueError if `array` has fewer than `least` elements, since a compiled loop would then read beyond its
    end. `what` is the name of the array in the error."""
    if len(array) < least:
        raise ValueError(f"{what} must have at least {least} elements, got {len(array)}")


def scalar(value: float, like: Array) -> Any:
    with np.errstate(over="ignore"):
        return like.dtype.type(value)


def bits_of(v: Tensor) -> tuple[Array, Any]:
    """Return the bit patterns of v, float[n], as signed integers of the same size, and a mask that clears their sign
    bits. The masked integers are in the order of the magnitudes of v."""
    bits = v.numpy().view(f"i{v.element_size()}")
    return bits, bits.dtype.type(np.iinfo(bits.dtype).max)
