"""A vector as a grid of cells, runs of consecutive coordinates: memory is read and written in runs, not one by one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.kernels import kernel


@dataclass(frozen=True)
class Cells:
    """Some of the cells [i size, (i + 1) size) of a vector of at least `size` coordinates; the last may be cut short.

    `index` are their numbers, distinct int64[m]. Values at cells are float[m size]; beyond the vector's end they are 0.
    """

    index: Tensor
    size: int

    def coordinates(self, d: int) -> Tensor:
        """Return the coordinates of these cells that are below d, int64[at most m size]."""
        if self.size == 1:
            return self.index
        runs = self.index[:, None] * self.size + torch.arange(self.size, device=self.index.device)
        return runs[runs < d]

    def gather(self, v: Tensor) -> Tensor:
        """Return v, float[d], at the cells."""
        if self.size == 1:
            return v[self.index]
        if loop := kernel("gather_cells", v):
            values: Tensor = loop(v, self.index, self.size)
            return values
        whole, rest = self._split(v)
        values = whole.index_select(0, self.index.clamp_max(len(whole) - 1))
        if len(rest):
            values = torch.where(
                self._is_rest(whole), torch.nn.functional.pad(rest, (0, self.size - len(rest))), values
            )
        return values.view(-1)

    def add_to(self, out: Tensor, values: Tensor, alpha: float) -> None:
        """Add alpha times values, float[m size], to out, float[d], in place at the cells."""
        if self.size == 1:
            out.index_add_(0, self.index, values, alpha=alpha)
            return
        if loop := kernel("add_cells", out, values):
            loop(out, self.index, self.size, values, alpha)
            return
        whole, rest = self._split(out)
        rows = values.view(-1, self.size)
        if len(rest):
            is_rest, zero = self._is_rest(whole), torch.zeros_like(rows)
            rest.add_(torch.where(is_rest, rows, zero).sum(0)[: len(rest)], alpha=alpha)
            rows = torch.where(is_rest, zero, rows)
        whole.index_add_(0, self.index.clamp_max(len(whole) - 1), rows, alpha=alpha)

    def _split(self, v: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the whole cells, float[n, size], and of the last one that is cut short, if there is one."""
        n = len(v) // self.size
        return v[: n * self.size].view(n, self.size), v[n * self.size :]

    def _is_rest(self, whole: Tensor) -> Tensor:
        """Which cells are the one that is cut short, bool[m, 1]: asked on the device, which nothing waits for."""
        return (self.index == len(whole))[:, None]
