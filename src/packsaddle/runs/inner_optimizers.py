"""Inner optimizers, which step on each worker between the exchanges of local updates, and their rate's schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.errors import ConfigError
from packsaddle.runs.config import Config, LocalConfig

_LAST_SHARE = 0.1  # of the peak rate
Named = Iterable[tuple[str, Tensor]]


def make_inner(config: Config, local: LocalConfig, parameters: Named) -> Optimizer:
    """Return the optimizer of a configuration's [local]. Raises ConfigError if this torch does not have it."""
    named = [(name, p) for name, p in parameters if p.requires_grad]
    rate: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    with_momentum: dict[str, Any] = {**rate, "momentum": config.momentum, "nesterov": config.nesterov}
    if local.optimizer == "sgd":
        return torch.optim.SGD(named, **with_momentum)
    beta1, beta2 = local.betas
    adamw: dict[str, Any] = {**rate, "betas": (beta1, beta2)}
    if local.optimizer == "adamw":
        return torch.optim.AdamW(named, **adamw)

    # Muon steps on matrices; all else is AdamW's, at the same rate (match_rms_adamw).
    muon = getattr(torch.optim, "Muon", None)
    if muon is None:
        raise ConfigError(
            f'local.optimizer = "muon" needs a torch that has torch.optim.Muon, as 2.9 does, and this is '
            f"{torch.__version__}"
        )
    matrices = [(name, p) for name, p in named if p.ndim == 2]
    others = [(name, p) for name, p in named if p.ndim != 2]
    made = [muon(matrices, adjust_lr_fn="match_rms_adamw", **with_momentum)] if matrices else []
    return Joined([*made, *([torch.optim.AdamW(others, **adamw)] if others else [])])


class Joined(Optimizer):
    """Several optimizers of different parameters as one; it has their groups and their state."""

    def __init__(self, members: list[Optimizer]) -> None:
        self._members = members
        self._sizes = [len(member.param_groups) for member in members]
        super().__init__([group for member in members for group in member.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Have the members step with the groups and the state that are here."""
        start = 0
        for member, size in zip(self._members, self._sizes, strict=True):
            member.param_groups = self.param_groups[start : start + size]
            member.state = self.state
            start += size

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step all of them, after the closure, whose value is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for member in self._members:
            member.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved."""
        super().load_state_dict(state_dict)
        self._share()


def share_of_peak(step: float, warm_up: float, end: float) -> float:
    """Return the share of the peak rate at a step, from 0: a linear warm-up, then half a cosine to a tenth at `end`."""
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1.0, end - warm_up)) if step > warm_up else 0.0
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2
