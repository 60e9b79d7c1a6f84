"""The first moments of Adam-like inner optimizers, mixed with the workers' mean update after an exchange.

Between exchanges a worker's first moment m follows its own gradients, with their noise. With
`LocalUpdates(mean_momentum=c)` each parameter's m becomes, after a round with the mean update u,

    m <- (1 - c) m + c ||m|| d / ||d||,    d = sqrt(v) * u (elementwise)

where v is the second moment, so that a step m / sqrt(v) continues along u. Nothing is sent for it. The rule is ours,
measured in experiments/muon; FedCM (Xu et al. 2021) instead adds u to every local gradient.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import local_part
from packsaddle.local.inner import Shards, names_of

_MOMENTS = {"exp_avg", "exp_avg_sq"}  # Adam's m and v in an optimizer's state
_WITH_MOMENTS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


class MeanMomentum:
    """Mixes the mean update into first moments; `fraction` is c, and `shards` sums norms over a worker's processes.
    Raises ValueError if all optimizers are torch's and none has Adam's moments."""

    def __init__(self, optimizers: Sequence[Optimizer], fraction: float, shards: Shards) -> None:
        self._optimizers, self._fraction, self._shards = optimizers, fraction, shards
        are_known = all(type(o).__module__.startswith("torch.optim.") for o in optimizers)
        if are_known and not any(isinstance(o, _WITH_MOMENTS) for o in optimizers):
            raise ValueError(self._lacking())

    def _lacking(self) -> str:
        return (
            f"mean_momentum needs an optimizer with Adam's moments, state exp_avg and exp_avg_sq, and "
            f"{names_of(self._optimizers)} has none: set mean_momentum=0"
        )

    def mix(self, parameters: Iterable[Tensor], updates: Iterable[Tensor]) -> None:
        """Mix the mean update of each parameter into its first moment, in place; overwrites `updates`.

        No-op for a parameter without moments, or whose mean update is 0. Collective over the shards of this worker.
        Raises ValueError if the optimizers have states, and none has Adam's moments.
        """
        # Compute d in at least float32, and the norms of m and d, without waiting for a GPU.
        moments, directions, norms = list[Tensor](), list[Tensor](), list[Tensor]()
        for p, update in zip(parameters, updates, strict=True):
            state: Mapping[str, Tensor] = next((o.state[p] for o in self._optimizers if p in o.state), {})
            if not state.keys() >= _MOMENTS:
                continue
            m = local_part(state["exp_avg"])
            v = local_part(state.get("max_exp_avg_sq", state["exp_avg_sq"]))  # the former with amsgrad
            dtype = torch.promote_types(m.dtype, torch.float32)
            d = update.to(m.device, dtype).view_as(m).mul_(v.to(dtype).sqrt())
            moments.append(m)
            directions.append(d)
            norms += [torch.linalg.vector_norm(x, dtype=dtype) for x in (m, d)]
        if not moments:
            self._check_states()
            return
        # Mix. A parameter that a shard does not have counts there as 0, and a replicated one in both norms as often.
        of_m, of_d = self._shards.total(torch.stack(norms).square()).sqrt().view(-1, 2).unbind(1)
        scales = torch.where(of_d > 0, of_m / of_d, 0.0)
        for m, d, scale, is_any in zip(moments, directions, scales, of_d > 0, strict=True):
            m.copy_(torch.lerp(m.to(d), d.mul_(scale), (self._fraction * is_any).to(d)))

    def _check_states(self) -> None:
        states = [state for o in self._optimizers for state in o.state.values()]
        if states and not any(state.keys() >= _MOMENTS for state in states):
            raise ValueError(self._lacking())
