"""Choice of the inner loops: compiled ones if possible, torch's otherwise.

On the CPU numba (the extra `packsaddle[fast]`) compiles `numerics.kernels.numba_loops`; on CUDA Triton, which comes
with torch there, compiles `numerics.kernels.triton_loops`. Every caller of one has a twin of it in torch,
with the same results, and takes that where `kernel` returns None: also if `PACKSADDLE_KERNELS=torch`.
"""

import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_LARGE = 1 << 20  # coordinates from which it matters
_DTYPES = (torch.float32, torch.float64)
_COMPILERS = {
    "cpu": ("numba", "packsaddle.numerics.kernels.numba_loops"),
    "cuda": ("triton", "packsaddle.numerics.kernels.triton_loops"),
}
_torch_only: ContextVar[bool] = ContextVar("packsaddle_torch_only", default=False)


class SlowKernelsWarning(UserWarning):
    """Large vectors are compressed by torch alone because numba is not installed, or cannot work here."""


def kernel(name: str, *vectors: Tensor, device: torch.device | str = "cpu") -> Callable[..., Any] | None:
    """Return the compiled loop of this name for these vectors (for none: on `device`), or None if there is none.

    Vectors must lie on one device, be of stride 1, in single or double precision, and not require a gradient.
    """
    if _torch_only.get() or any(not _takes(v) for v in vectors):
        return None
    where = vectors[0].device.type if vectors else torch.device(device).type
    if any(v.device.type != where for v in vectors):
        return None
    module = _module(where)
    if module is None and where == "cpu" and vectors and max(v.numel() for v in vectors) >= _LARGE:
        _announce()
    found: Callable[..., Any] | None = getattr(module, name, None)
    return found


def compiler(device: torch.device | str) -> str:
    """Return what compiles loops for a device: "numba", "triton", or "torch" where nothing does."""
    where = torch.device(device).type
    return _COMPILERS[where][0] if not _torch_only.get() and _module(where) else "torch"


def obstacle(device: torch.device | str) -> str:
    """Return why nothing compiles loops for a device; "" if something does."""
    return _load(torch.device(device).type)[1]


def _takes(v: Tensor) -> bool:
    return v.dtype in _DTYPES and v.stride() == (1,) and not v.requires_grad


def _module(where: str) -> ModuleType | None:
    return _load(where)[0]


@cache
def _load(where: str) -> tuple[ModuleType | None, str]:
    """The module of compiled loops, or why there is none."""
    if os.environ.get("PACKSADDLE_KERNELS") == "torch":
        return None, "PACKSADDLE_KERNELS=torch asks for torch alone"
    if where not in _COMPILERS:
        return None, f"there are no compiled loops for {where}"
    needed, module = _COMPILERS[where]
    if importlib.util.find_spec(needed) is None:
        return None, f"{needed} is not installed"
    try:
        return importlib.import_module(module), ""  # not at the top: numba takes a second to import
    except (ImportError, RuntimeError) as error:  # numba raises the latter where it may write no cache anywhere
        warnings.warn(f"{needed} cannot be used: {error}", SlowKernelsWarning, stacklevel=4)
        return None, f"{needed} cannot be used: {error}"


@cache
def _announce() -> None:
    """Say once that there is a faster way, unless the slow one was asked for."""
    if os.environ.get("PACKSADDLE_KERNELS") != "torch" and importlib.util.find_spec("numba") is None:
        warnings.warn(
            "numba is not installed, so large vectors are compressed by torch alone, some of them several times "
            "slower; pip install 'packsaddle[fast]', or set PACKSADDLE_KERNELS=torch to silence this warning",
            SlowKernelsWarning,
            stacklevel=4,
        )


@contextmanager
def torch_only() -> Iterator[None]:
    """Use torch alone inside, to compare."""
    token = _torch_only.set(True)
    try:
        yield
    finally:
        _torch_only.reset(token)
