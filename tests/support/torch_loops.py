"""Contexts in which torch's loops replace the compiled ones, to compare the two."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from unittest import mock

import torch

from packsaddle.numerics import kernels

T = TypeVar("T")


@contextmanager
def torch_only() -> Iterator[None]:
    """A context in which only torch's loops are used, and no compiled ones."""
    with mock.patch.object(kernels, "_load", return_value=({}, "a test asks for torch alone")):
        yield


def both(work: Callable[[], T]) -> tuple[T, T]:
    """Call `work` twice, and return its results with the compiled loops and with torch's loops."""
    with torch_only():
        plain = work()
    return work(), plain


@contextmanager
def two_threads() -> Iterator[None]:
    """A context in which torch and the compiled loops use two threads."""
    torch.set_num_threads(2)
    try:
        yield
    finally:
        torch.set_num_threads(1)
