"""The check after the first inner step of local updates: two faults that no error would tell of.

Workers that began at different parameters train models of which the mean is none, and workers whose gradients are
exchanged as well pay for all that local updates save.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.optim.stages.drift import fingerprint

_PROOF = 16  # different values: gradients with fewer may be equal on all workers by chance


def check_first_step(
    channel: Communicator,
    anchors: Sequence[Tensor],
    gradients: Sequence[Tensor],
    do: Callable[[Callable[[], object]], None],
) -> None:
    """Check that workers began at one x, and that nothing else exchanges gradients; collective if there are several.

    `anchors` are where this worker began, `gradients` those that it has stepped by, and `do` carries out what is
    collective. Raises RuntimeError if anchors differ, or if gradients are equal bit for bit on all workers. Those of
    fewer than 16 different values may be equal by chance, as that of a sum: then rank 0 warns. NaNs prove nothing.
    """
    if channel.group.size == 1:
        return
    gradients = [g if g.layout == torch.strided else g.to_dense() for g in gradients]
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
    values = _distinct(gradients) if all(grad == prints[0][1] for _, grad in prints) else 0
    if not values:
        return
    found = (
        f"gradients are equal bit for bit on all {len(prints)} workers at the first step: either they are exchanged as "
        f"well (by DistributedDataParallel, say; see packsaddle.keep_gradients_local), or all workers have the same "
        f"batch: give each its own, by a DistributedSampler or as data[rank::workers]"
    )
    if values >= _PROOF:
        raise RuntimeError(found)
    if channel.group.rank == 0:
        warnings.warn(f"{found}. It may be chance: they have few different values, {values}", stacklevel=2)


def _distinct(gradients: Sequence[Any]) -> int:
    """Return the number of different values in gradients, but for 0, Inf and NaN."""
    found: list[Any] = [g[g.isfinite() & (g != 0)].double().unique() for g in gradients]
    return len(set(torch.cat(found).tolist())) if found else 0
