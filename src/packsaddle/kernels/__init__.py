"""Which implementation of the inner loops is used: compiled ones where they can be, torch's otherwise.

On the CPU numba (the extra `packsaddle[fast]`) compiles `kernels.cpu`. Whoever calls one has the same thing in torch
beside it, with the same results, and takes that where `compiled` returns None: also if `PACKSADDLE_KERNELS=torch`.
"""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

_LARGE = 1 << 20  # coordinates from which it matters
_DTYPES = (torch.float32, torch.float64)
_torch_only: ContextVar[bool] = ContextVar("packsaddle_torch_only", default=False)


class SlowKernelsWarning(UserWarning):
    """Large vectors are compressed by torch alone because numba is not installed."""


def compiled(*vectors: Tensor) -> ModuleType | None:
    """Return `kernels.cpu` if it can take these vectors: on the CPU, of stride 1, in single or double precision."""
    if _torch_only.get() or any(
        v.device.type != "cpu" or v.dtype not in _DTYPES or v.stride() != (1,) for v in vectors
    ):
        return None
    module = _module()
    if module is None and vectors and max(v.numel() for v in vectors) >= _LARGE:
        _announce()
    return module


@cache
def _module() -> ModuleType | None:
    if os.environ.get("PACKSADDLE_KERNELS") == "torch" or importlib.util.find_spec("numba") is None:
        return None
    from packsaddle.kernels import cpu  # not at the top: numba takes a second to import

    return cpu


@cache
def _announce() -> None:
    """Say once that there is a faster way, unless the slow one was asked for."""
    if os.environ.get("PACKSADDLE_KERNELS") != "torch":
        warnings.warn(
            "numba is not installed, so large vectors are compressed by torch alone, some of them several times "
            "slower; pip install 'packsaddle[fast]', or set PACKSADDLE_KERNELS=torch to be content with it",
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
