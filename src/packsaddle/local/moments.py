"""After an exchange, mixes the workers' mean update into the first moments of Adam-like inner optimizers.

Between exchanges a worker's first moment m is a running mean of its own gradients, including their noise. With
`LocalUpdates(mean_momentum=c)` each parameter's m becomes, after a round with the mean update u,

    m <- (1 - c) m + c ||m|| d / ||d||,    d = sqrt(v) * u (elementwise)

where v is Adam's second moment of the parameter. So Adam's next step, along m / sqrt(v), has the direction u if c is 1.
The rule needs no additional communication, and is ours, measured in experiments/muon; FedCM (Xu et al. 2021) instead
adds u to every local gradient.
"""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import Shards, local_part
from packsaddle.feedback.optimizers import CompositeOptimizer, with_members
from packsaddle.local.options import AnyOuter, OuterAgreement
from packsaddle.local.round import Ended
from packsaddle.local.watch import names_of
from packsaddle.numerics.devices import to_device, wide

_log = logging.getLogger("packsaddle")
_ADAMS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.SparseAdam)


_USUAL = 0.5  # default of `mean_momentum` with Adam, the fraction with the lowest measured losses


def usual_fraction(optimizers: Sequence[Optimizer], outer: AnyOuter) -> float:
    """Return the default of `LocalUpdates.mean_momentum`. The default is 0.5 if three conditions hold: an optimizer is
    Adam or a variant of it, none is Muon, and `outer` has no momentum. Otherwise it is 0. Optimizers other than torch's
    are recognized by their class names. A function as `outer` counts as an optimizer with a momentum unless it has an
    attribute `momentum` that is 0."""
    found = list(with_members(optimizers))
    names = [type(optimizer).__name__.lower() for optimizer in found]
    then = outer.then if isinstance(outer, OuterAgreement) else outer
    outer_momentum = 0.0 if then is None else getattr(then, "momentum", 1.0)
    adams = [isinstance(o, _ADAMS) if _is_torchs(o) else "adam" in type(o).__name__.lower() for o in found]
    is_adam = any(adams) and not any("muon" in name for name in names)
    return _USUAL if is_adam and not outer_momentum else 0.0


class MeanMomentum:
    """Mixes the workers' mean update into the first moments of Adam-like optimizers.

    `fraction` is c in [0, 1] in the module's formula, the weight of the mean update. `shards` sums norms over a
    worker's processes. Raises ValueError if all optimizers are classes of torch, and none of them is Adam or a variant
    of Adam with an elementwise second moment.
    """

    def __init__(self, optimizers: Sequence[Optimizer], fraction: float, shards: Shards) -> None:
        self._fraction, self._shards = fraction, shards
        # Replace an optimizer that joins others, such as a `JoinedOptimizer`, by the optimizers that it joins.
        self._optimizers = apart = [o for o in with_members(optimizers) if not isinstance(o, CompositeOptimizer)]
        self._may_warn = not any(isinstance(optimizer, _ADAMS) for optimizer in apart)
        if self._may_warn and all(map(_is_torchs, apart)):
            raise ValueError(
                f"mean_momentum needs Adam's moments, state exp_avg and exp_avg_sq, and {names_of(apart)} has "
                f"none: set mean_momentum=0"
            )

    def warn_if_advised_against(self, outer: Optimizer | None, *, stacklevel: int) -> None:
        """Warn if an inner optimizer is Muon, or if the outer optimizer `outer` has a momentum. In both cases measured
        losses were higher with `mean_momentum` than without it."""
        muons = [type(o).__name__ for o in self._optimizers if "muon" in type(o).__name__.lower()]
        groups = [] if outer is None else outer.param_groups
        others = [f"outer={type(outer).__name__} with momentum"] if any(map(_has_momentum, groups)) else []
        if muons or others:
            warnings.warn(
                f"mean_momentum raised the loss in our measurements with {' and '.join(muons + others)}: set "
                f"mean_momentum=0, or use it with Adam or AdamW alone",
                stacklevel=stacklevel,
            )

    def __call__(self, r: Ended) -> None:
        """Mix the mean update of an applied round into the first moments.

        No-op after a flush (an exchange of all pending updates), since its update includes fewer steps than that of a
        round. No-op with one worker too, since the mean update is then the worker's own update.
        """
        if r.applied and not r.is_flush and r.part.feedback.channel.group.size > 1:
            assert isinstance(r.mean, Tensor)
            # With `offload` the mean is on the CPU. Copy it to the parameters' device once, as one vector.
            named = r.part.named(to_device(r.mean, local_part(r.part.parameters[0]).device))
            updates = [None if place.name in r.frozen else update for place, update in named]
            self.mix(r.part.parameters, updates)

    def mix(self, parameters: Sequence[Tensor], updates: Sequence[Tensor | None]) -> None:
        """Mix the mean update of each parameter into its first moment, in place. The update of a frozen parameter is
        None.

        No-op for a parameter that is frozen, whose moments are missing, non-finite or of another shape than the
        parameter, or whose mean update is 0. Collective over the processes that have shards of this worker's
        parameters. Logs a warning at the first call if no parameter has moments, unless one of the optimizers is
        torch's Adam or a variant of it.
        """
        # For each parameter, compute the norm of its first moment m and the norm of the new direction d. For a
        # parameter without moments both are 0, so that all processes sum vectors of equal size even if one process has
        # lost its moments.
        moments = [self._moments(p, update) for p, update in zip(parameters, updates, strict=True)]
        device = local_part(parameters[0]).device
        norms = torch.zeros(2 * len(moments), dtype=wide(device), device=device)
        for i, found in enumerate(moments):
            if found is not None:
                m, v, update = found
                norms[2 * i] = torch.linalg.vector_norm(m, dtype=_at_least_float32(m))
                norms[2 * i + 1] = torch.linalg.vector_norm(_direction(m, v, update))
        of_m, of_d = self._shards.total(norms.square_()).sqrt_().view(-1, 2).unbind(1)
        # Scale each direction d to the norm of its first moment m, and mix it into m. If the scale is not finite, m is
        # unchanged. The test is made on the parameters' device, so the host does not wait for a GPU.
        scales = torch.where((of_d > 0) & of_d.isfinite(), of_m / of_d, torch.nan)
        for found, scale in zip(moments, scales, strict=True):
            if found is not None:
                m, v, update = found
                d = _direction(m, v, update).mul_(scale)
                m.copy_(torch.where(scale.isfinite(), torch.lerp(m.to(d), d, self._fraction), m))
                self._may_warn = False
        if self._may_warn:
            self._may_warn = False
            _log.warning("mean_momentum has no effect: %s has no exp_avg and exp_avg_sq", names_of(self._optimizers))

    def _moments(self, p: Tensor, update: Tensor | None) -> tuple[Tensor, Tensor, Tensor] | None:
        """Return the first moment m and the second moment v of the parameter `p`, and its mean update on their device.
        If the parameter is sharded, the three tensors are this process's shards. Returns None if the parameter is
        frozen, i.e. if `update` is None, or if the optimizer has no moments with the parameter's shape."""
        state: Mapping[str, Tensor] = next((o.state[p] for o in self._optimizers if p in o.state), {})
        # With amsgrad, Adam divides by the maximum of the second moments, so use that as v.
        v = state.get("max_exp_avg_sq", state.get("exp_avg_sq"))
        if update is None or "exp_avg" not in state or v is None:
            return None
        m, v = local_part(state["exp_avg"]), local_part(v)
        update = update if update.device == m.device else to_device(update, m.device)
        return (m, v, update) if m.shape == v.shape == local_part(p).shape else None


def _is_torchs(optimizer: Optimizer) -> bool:
    return f"{type(optimizer).__module__}.".startswith("torch.optim.")


def _has_momentum(group: Mapping[str, Any]) -> bool:
    return bool(group.get("momentum") or group.get("betas", (0.0,))[0])


def _direction(m: Tensor, v: Tensor, update: Tensor) -> Tensor:
    """Return d = sqrt(v) * u, the direction of a first moment m for which Adam's step m / sqrt(v) is along the update
    u. d has at least float32 precision. All tensors are on one device."""
    dtype = _at_least_float32(m)
    return v.to(dtype).sqrt() * update.to(dtype).view_as(m)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
