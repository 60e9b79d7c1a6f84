"""The memory bandwidth of this machine, the floor of work that reads and writes long vectors."""

import torch

from packsaddle.plan import side_by_side


def copy_bandwidth(numel: int) -> float:
    """Measure the bandwidth in bytes a second by copying float32[numel]; each element is read and written."""
    source, target = torch.ones(numel), torch.ones(numel)
    return 8 * numel / side_by_side({"copy": lambda: target.copy_(source)}, repeats=7)["copy"].median
