"""The compiled inner loops: each reads and writes memory once, for tensors as `kernels.compiled` asks for."""

from packsaddle.numerics.kernels.numba_quantized import (
    add_levels,
    add_signs,
    pack_levels,
    pack_numbers,
    pack_signs,
    sum_of_magnitudes,
    unpack_numbers,
)
from packsaddle.numerics.kernels.numba_random import add_cell_gaussians, add_gaussians
from packsaddle.numerics.kernels.numba_sparse import add_cells, energy_histogram, feistel_sample, gather_cells, reaching

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
