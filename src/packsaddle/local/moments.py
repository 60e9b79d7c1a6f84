"""The first moments of Adam-like inner optimizers, mixed with the workers' mean update after an exchange.

Between exchanges a worker's first moment m follows its own gradients, with their noise. With
`LocalUpdates(mean_momentum=c)` each parameter's m becomes, after a round with the mean update u,

    m <- (1 - c) m + c ||m|| d / ||d||,    d = sqrt(v) * u (elementwise)

where v is the second moment, so that a step m / sqrt(v) continues along u. Nothing is sent for it. The rule is ours;
its measurements are in experiments/muon.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import local_part
from packsaddle.local.inner import names_of

_MOMENTS = {"exp_avg", "exp_avg_sq"}  # Adam's m and v in an optimizer's state
_WITH_MOMENTS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam)


class MeanMomentum:
    """Mixes the mean update into first moments; `fraction` is c. Raises ValueError if all optimizers are torch's and
    none has Adam's moments."""

    def __init__(self, optimizers: Sequence[Optimizer], fraction: float) -> None:
        self._optimizers, self._fraction = optimizers, fraction
        torchs = [o for o in optimizers if type(o).__module__.startswith("torch.optim.")]
        if len(torchs) == len(optimizers) and not any(isinstance(o, _WITH_MOMENTS) for o in optimizers):
            raise ValueError(self._lacking())

    def _lacking(self) -> str:
        return (
            f"mean_momentum needs an optimizer with Adam's moments, state exp_avg and exp_avg_sq, and "
            f"{names_of(self._optimizers)} has none: set mean_momentum=0"
        )

    def mix(self, parameters: Iterable[Tensor], updates: Iterable[Tensor]) -> None:
        """Mix the mean update of each parameter into its first moment, in place.

        No-op for a parameter without moments, or whose mean update is 0. Norms of DTensors are those of this process's
        shards. Raises ValueError if the optimizers have states, and none has Adam's moments.
        """
        for p, update in zip(parameters, updates, strict=True):
            state: Mapping[str, Tensor] = next((o.state[p] for o in self._optimizers if p in o.state), {})
            if not state.keys() >= _MOMENTS:
                continue
            m = local_part(state["exp_avg"])
            v = local_part(state.get("max_exp_avg_sq", state["exp_avg_sq"]))  # the former with amsgrad
            # Compute in at least float32, without waiting for a GPU.
            old = m.to(torch.promote_types(m.dtype, torch.float32))
            d = update.to(old).view_as(old) * v.to(old).sqrt()
            norm = torch.linalg.vector_norm(d)
            target = d * (torch.linalg.vector_norm(old) / norm.clamp(min=torch.finfo(old.dtype).tiny))
            m.copy_(torch.lerp(old, target, self._fraction * (norm > 0)))
        states = [state for o in self._optimizers for state in o.state.values()]
        if states and not any(state.keys() >= _MOMENTS for state in states):
            raise ValueError(self._lacking())
