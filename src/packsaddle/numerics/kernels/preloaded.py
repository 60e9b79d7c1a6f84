"""Preload module for a multiprocessing fork server: imports and initializes numba once for all forked processes.

Importing numba takes half a second, and initializing it at the first call of a loop another half second.
"""

import os
from contextlib import suppress

import torch

if os.environ.get("PACKSADDLE_KERNELS") != "torch":
    with suppress(ImportError, RuntimeError):  # numba is missing, or has no writable cache directory
        from packsaddle.numerics.kernels import numba_random

        numba_random.add_gaussians(torch.zeros(1), 1.0, (0, 0, 0), 0)
