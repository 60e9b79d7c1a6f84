"""Preload module for a multiprocessing fork server. It imports and initializes numba, which takes a second, once for
all workers."""

import os
from contextlib import suppress

import torch

if os.environ.get("PACKSADDLE_KERNELS") != "torch":
    with suppress(ImportError, RuntimeError):  # numba is missing, or has no writable cache directory
        from packsaddle.numerics.kernels import numba_random

        numba_random.add_gaussians(torch.zeros(1), 1.0, (0, 0, 0), 0)
