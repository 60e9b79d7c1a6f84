"""The check after the first inner step of local updates: two faults that no error would tell of.

Workers that began at different parameters train models of which the mean is none, and workers whose gradients are
exchanged as well pay for all that local updates save.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.optim.stages.drift import fingerprint


def check_first_step(
    channel: Communicator,
    anchors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    do: Callable[[Callable[[], object]], None],
) -> None:
    """Check that workers began at one x, and that nothing else exchanges gradients; collective if there are several.

    `anchors` are where this worker began, `gradients` those that it has stepped by, and `do` carries out what is
    collective. Raises RuntimeError if anchors differ, or if gradients are equal bit for bit on all workers.
    """
    if channel.group.size == 1:
        return
    start = torch.stack([fingerprint(anchor) for anchor in anchors]).sum().cpu()
    whole = torch.stack([fingerprint(g) for g in gradients]).sum().cpu() if gradients else start.new_zeros(())
    gathered: list[Any] = []
    mine = {"prints": torch.stack([start, whole]).to(anchors[0].device)}
    do(lambda: gathered.extend(channel.gather(mine, fixed_size=True, purpose="start")))
    prints = [parts["prints"].tolist() for parts in gathered]
    others = [worker for worker, (anchor, _) in enumerate(prints) if anchor != prints[0][0]]
    if others:
        raise RuntimeError(
            f"workers must begin at the same parameters, but worker {others[0]} differs from worker 0: load "
            f"weights on all workers, or before LocalUpdates is made"
        )
    if gradients and any(bool(g.any()) for g in gradients) and all(grad == prints[0][1] for _, grad in prints):
        raise RuntimeError(
            f"gradients are equal bit for bit on all {len(prints)} workers at the first step: either they are "
            f"exchanged as well (by DistributedDataParallel, say; see packsaddle.keep_gradients_local), or all "
            f"workers have the same batch: give each its own, by a DistributedSampler or as data[rank::workers]"
        )
