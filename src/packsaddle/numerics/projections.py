"""Random Gaussian projections of the blocks of a vector, whose squares tell which blocks have the most energy.

The numbers are a function of a key and of block, row and place (see `numerics.seeds`), so all workers project alike and
no matrix is stored. Projections of different blocks are independent.
"""

import torch
from torch import Tensor

from packsaddle.numerics.seeds import Keys, add_gaussians

_SLAB = 1 << 17  # random numbers at a time, so that scratch memory stays in a near cache


def project_blocks(v: Tensor, size: int, rows: int, key: Keys) -> Tensor:
    """Return G_j v_j for each block v_j of `size` coordinates, float[blocks * rows], with G_j of N(0, 1) numbers.

    The last block may be cut short. Numbers are of single precision at least, whatever v has.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    together = max(1, _SLAB // (size * rows))  # blocks
    numbers = torch.empty(together * rows * size, dtype=dtype, device=v.device)
    projected = []
    for i, part in enumerate(torch.split(v, together * size)):
        blocks = -(-len(part) // size)
        padded = torch.nn.functional.pad(part.to(dtype), (0, blocks * size - len(part)))
        g = numbers[: blocks * rows * size].zero_()
        add_gaussians(g, 1.0, key, start=i * together * rows * size)
        projected.append(torch.linalg.vecdot(g.view(blocks, rows, size), padded.view(blocks, 1, size)).view(-1))
    return torch.cat(projected) if projected else torch.zeros(0, dtype=dtype, device=v.device)
