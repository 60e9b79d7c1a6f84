"""To be imported by a server of processes, which are forks of it: compiled loops, ready for their first call.

To import numba takes a process half a second, and what numba loads at the first call of any loop as long again.
"""

import os
from contextlib import suppress

import torch

if os.environ.get("PACKSADDLE_KERNELS") != "torch":
    with suppress(ImportError, RuntimeError):  # where numba is missing, or may write no cache
        from packsaddle.numerics.kernels import numba_random

        numba_random.add_gaussians(torch.zeros(1), 1.0, (0, 0, 0), 0)
