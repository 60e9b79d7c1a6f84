"""Choice of the inner loops: compiled ones if possible, torch's otherwise.

On the CPU numba compiles them (the extra `packsaddle[fast]`), on CUDA Triton, which comes with torch there. Every
caller has a twin of each loop in torch, with the same results, for where `kernel` returns None.
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

_LARGE = 1 << 20  # coordinates from which it matters
_DTYPES = (torch.float32, torch.float64)
_COMPILERS = {  # of a device, with the modules of their loops
    "cpu": ("numba", ("numba_loops", "numba_random", "numba_codes", "numba_levels")),
    "cuda": ("triton", ("triton_loops",)),
}


class SlowKernelsWarning(UserWarning):
    """Large vectors are compressed by torch alone because numba is not installed, or cannot work here."""


def kernel(name: str, *vectors: Tensor, device: torch.device | str = "cpu") -> Callable[..., Any] | None:
    """Return the compiled loop of this name for these vectors (for none: on `device`), or None if there is none.

    Vectors must lie on one device, be of stride 1, in single or double precision, and not require a gradient.
    """
    if any(v.dtype not in _DTYPES or v.stride() != (1,) or v.requires_grad for v in vectors):
        return None
    where = vectors[0].device.type if vectors else torch.device(device).type
    if any(v.device.type != where for v in vectors):
        return None
    loops = _load(where)[0]
    if not loops and where == "cpu" and vectors and max(v.numel() for v in vectors) >= _LARGE:
        _announce()
    return loops.get(name)


def compiler(device: torch.device | str) -> str:
    """Return what compiles loops for a device: "numba", "triton", or "torch" where nothing does."""
    where = torch.device(device).type
    return _COMPILERS[where][0] if _load(where)[0] else "torch"


def obstacle(device: torch.device | str) -> str:
    """Return why nothing compiles loops for a device; "" if something does."""
    return _load(torch.device(device).type)[1]


@cache
def _load(where: str) -> tuple[dict[str, Any], str]:
    """Return the compiled loops by name, or none and the reason."""
    if os.environ.get("PACKSADDLE_KERNELS") == "torch":
        return {}, "PACKSADDLE_KERNELS=torch asks for torch alone"
    if where not in _COMPILERS:
        return {}, f"there are no compiled loops for {where}"
    needed, modules = _COMPILERS[where]
    if importlib.util.find_spec(needed) is None:
        return {}, f"{needed} is not installed"
    try:  # not at the top: numba takes a second to import
        loops = [vars(importlib.import_module(f"{__name__}.{module}")).items() for module in modules]
        return {name: loop for found in loops for name, loop in found}, ""
    except (ImportError, RuntimeError) as error:  # numba raises the latter where it may write no cache anywhere
        warnings.warn(f"{needed} cannot be used: {error}", SlowKernelsWarning, stacklevel=4)
        return {}, f"{needed} cannot be used: {error}"


@cache
def _announce() -> None:
    """Warn once that numba is missing, unless torch was asked for."""
    if os.environ.get("PACKSADDLE_KERNELS") != "torch" and importlib.util.find_spec("numba") is None:
        warnings.warn(
            "numba is not installed, so large vectors are compressed by torch alone, some of them several times "
            "slower; pip install 'packsaddle[fast]', or set PACKSADDLE_KERNELS=torch to silence this warning",
            SlowKernelsWarning,
            stacklevel=4,
        )
