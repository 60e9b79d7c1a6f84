"""The first moments of inner optimizers with Adam's state, mixed with the workers' mean update after an exchange.

Between exchanges a worker's first moment m follows its own gradients, whose noise the mean update does not have. With
`LocalUpdates(mean_momentum=c)` each parameter's m becomes, after a round with the mean update u,

    m <- (1 - c) m + c ||m|| d / ||d||,    d = sqrt(v) * u (elementwise)

where v is the second moment, so that a step m / sqrt(v) continues along u. Nothing is sent for it. The rule is ours.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import local_part


def mix_moments(
    optimizers: Sequence[Optimizer], parameters: Iterable[Tensor], updates: Iterable[Tensor], fraction: float
) -> bool:
    """Mix the mean update of each parameter into its first moment, in place; return False if none has Adam's state.

    A parameter is left out if no optimizer has `exp_avg` and `exp_avg_sq` for it, or if its mean update is 0. Norms of
    DTensors are those of this process's shards.
    """
    found = False
    for p, update in zip(parameters, updates, strict=True):
        state = next((optimizer.state[p] for optimizer in optimizers if p in optimizer.state), {})
        if not {"exp_avg", "exp_avg_sq"} <= state.keys():
            continue
        found = True
        m = local_part(state["exp_avg"])
        v = local_part(state.get("max_exp_avg_sq", state["exp_avg_sq"]))  # the former with amsgrad
        # Compute in at least float32, without waiting for a GPU.
        old = m.to(torch.promote_types(m.dtype, torch.float32))
        d = update.to(old).view_as(old) * v.to(old).sqrt()
        norm = torch.linalg.vector_norm(d)
        target = d * (torch.linalg.vector_norm(old) / norm.clamp(min=torch.finfo(old.dtype).tiny))
        m.copy_(torch.lerp(old, target, fraction * (norm > 0)))
    return found
