"""Lookup of compiled inner loops by name, with a fallback to PyTorch.

Loops are compiled by numba (the extra `packsaddle[fast]`) and run on the CPU. Every caller of `kernel` has an
equivalent PyTorch implementation, which it uses if `kernel` returns None, as for tensors on a GPU.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LARGE = 1 << 20  # vector length from which `kernel` warns if numba is not installed
_DTYPES = (torch.float32, torch.float64)
NO_NUMBA = "numba is not installed"
_MODULES = ("numba_loops", "numba_random", "numba_codes", "numba_values")


class SlowKernelsWarning(UserWarning):
    """Warning that compiled loops are unavailable (numba is missing or fails), so large vectors use slower code."""


def kernel(name: str, *vectors: Tensor, device: torch.device | str = "cpu") -> Callable[..., Any] | None:
    """Return the compiled loop `name` for `vectors` and for other tensors on `device`.

    Returns None if there is no such loop, or if `device` or a vector's device is not the CPU. Also returns None if a
    vector has a stride other than 1, is neither float32 nor float64, or requires gradients.
    """
    if any(v.dtype not in _DTYPES or v.stride() != (1,) or v.requires_grad for v in vectors):
        return None
    if any(torch.device(where).type != "cpu" for where in (device, *(v.device for v in vectors))):
        return None
    loops, problem = _load()
    if problem == NO_NUMBA and vectors and max(v.numel() for v in vectors) >= _LARGE:
        _announce()
    return loops.get(name)


def compiler(device: torch.device | str) -> str:
    """Return the compiler of the inner loops that a device uses: "numba", or "torch" if the loops are not compiled."""
    return "numba" if torch.device(device).type == "cpu" and _load()[0] else "torch"


def arithmetic(device: torch.device | str) -> str:
    """Return a text that names the type of a device and the compiler of its inner loops, such as "numba on cpu".

    The result must be equal on all workers. Otherwise results that every worker computes separately could differ:
    random numbers, sums, the order of ties.
    """
    return f"{compiler(device)} on {torch.device(device).type}"


def obstacle() -> str:
    """Return the reason why there are no compiled loops, or "" if there are."""
    return _load()[1]


@cache
def _load() -> tuple[dict[str, Any], str]:
    """Import the compiled loops. Returns a dict of the loops by name, and an empty text. If there are no compiled
    loops, returns an empty dict, and the reason."""
    if os.environ.get("PACKSADDLE_KERNELS") == "torch":
        return {}, "PACKSADDLE_KERNELS=torch asks for torch alone"
    if importlib.util.find_spec("numba") is None:
        return {}, NO_NUMBA
    try:  # imported here because importing numba takes a second
        loops = [vars(importlib.import_module(f"{__name__}.{module}")).items() for module in _MODULES]
        return {name: loop for found in loops for name, loop in found}, ""
    except (ImportError, RuntimeError) as error:  # numba raises RuntimeError without a writable cache directory
        warnings.warn(f"numba cannot be used: {error}", SlowKernelsWarning, stacklevel=4)
        return {}, f"numba cannot be used: {error}"


@cache
def _announce() -> None:
    warnings.warn(
        f"{NO_NUMBA}, so large vectors are compressed by torch alone, some of them several times slower; "
        "pip install 'packsaddle[fast]', or set PACKSADDLE_KERNELS=torch to silence this warning",
        SlowKernelsWarning,
        stacklevel=4,
    )
