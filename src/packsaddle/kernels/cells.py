"""Runs of b consecutive coordinates, see `compress.cells`."""

import torch
from torch import Tensor

from packsaddle.kernels.parts import Array, compiled_loop, scalar


def gather_cells(v: Tensor, cells: Tensor, b: int) -> Tensor:
    """Return v at the cells, float[m b], with zeros where the last cell of the grid is cut short."""
    out = torch.empty(cells.numel() * b, dtype=v.dtype)
    _gather_cells(v.numpy(), cells.numpy(), b, out.numpy())
    return out


@compiled_loop
def _gather_cells(v: Array, cells: Array, b: int, out: Array) -> None:
    d = len(v)
    for i in range(len(cells)):
        start = cells[i] * b
        # Loops run over slices: numba then knows that no index is negative, and makes vector code of them.
        source, target = v[start : min(d, start + b)], out[i * b : (i + 1) * b]
        for j in range(len(source)):
            target[j] = source[j]
        target[len(source) :] = 0.0


def add_cells(out: Tensor, cells: Tensor, b: int, values: Tensor, alpha: float) -> None:
    """Add alpha times values, float[m b], to out, float[d], at the cells."""
    scale = scalar(alpha, out.numpy())
    _add_cells(out.numpy(), cells.numpy(), b, values.numpy(), scale)


@compiled_loop
def _add_cells(out: Array, cells: Array, b: int, values: Array, alpha: float) -> None:
    d = len(out)
    for i in range(len(cells)):
        start = cells[i] * b
        target = out[start : min(d, start + b)]
        source = values[i * b : i * b + len(target)]
        for j in range(len(target)):
            target[j] += alpha * source[j]
