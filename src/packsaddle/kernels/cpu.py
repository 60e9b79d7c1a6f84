"""The compiled inner loops: each reads and writes memory once, for tensors as `kernels.compiled` asks for."""

from packsaddle.kernels.cells import add_cells, gather_cells
from packsaddle.kernels.quantization import (
    add_levels,
    add_signs,
    pack_levels,
    pack_numbers,
    pack_signs,
    sum_of_magnitudes,
    unpack_numbers,
)
from packsaddle.kernels.random import add_cell_gaussians, add_gaussians
from packsaddle.kernels.sampling import feistel_sample
from packsaddle.kernels.selection import energy_histogram, reaching

__all__ = [
    "add_cell_gaussians",
    "add_cells",
    "add_gaussians",
    "add_levels",
    "add_signs",
    "energy_histogram",
    "feistel_sample",
    "gather_cells",
    "pack_levels",
    "pack_numbers",
    "pack_signs",
    "reaching",
    "sum_of_magnitudes",
    "unpack_numbers",
]
