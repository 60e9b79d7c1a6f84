"""Torch's loops in place of the compiled ones, to compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

import torch

from packsaddle.numerics import kernels

T = TypeVar("T")


@contextmanager
def torch_only() -> Iterator[None]:
    """Use torch alone inside."""
    with mock.patch.object(kernels, "_load", return_value=({}, "a test asks for torch alone")):
        yield


def both(work: Callable[[], T]) -> tuple[T, T]:
    """Return what the compiled loops give, and what torch gives."""
    with torch_only():
        plain = work()
    return work(), plain


@contextmanager
def two_threads() -> Iterator[None]:
    """Let torch and the compiled loops have two threads inside."""
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)
