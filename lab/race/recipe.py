"""Recipes of training in a race: the inner optimizer, its learning rate over the steps, and the clipping of gradients.

"adamw" is nanoGPT's recipe: betas 0.9 and 0.99, weight decay 0.1 on matrices, gradients clipped to norm 1. "momentum"
is the usual recipe for image networks: SGD with momentum 0.9 and weight decay 5e-4. Both have a linear warm-up, then a
cosine down to a tenth of the peak rate. "sgd" is the paper's recipe: a constant step size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

Kind = Literal["sgd", "momentum", "adamw"]
_WARM_UP = 0.1  # length of the warm-up as a fraction of all steps, but at most _LONGEST steps
_LONGEST = 100
_LAST_SHARE = 0.1  # fraction of the peak rate at the end


@dataclass(frozen=True)
class Recipe:
    """The recipe of a training with `steps` steps: optimizer, learning rate schedule and clipping."""

    optimizer: Kind = "sgd"
    steps: int = 1000

    def __post_init__(self) -> None:
        if self.optimizer not in get_args(Kind):
            raise ValueError(f"optimizer must be one of {', '.join(get_args(Kind))}, got {self.optimizer!r}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")

    @property
    def clip(self) -> float | None:
        """The maximum norm of a gradient; None: no clipping."""
        return 1.0 if self.optimizer == "adamw" else None

    def make(self, parameters: Iterable[nn.Parameter], lr: float, *, momentum: float = 0.0) -> torch.optim.Optimizer:
        """Return the optimizer with the peak learning rate `lr`. `momentum` is for the recipe "sgd" only."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr, momentum=momentum)
        if self.optimizer == "momentum":
            return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
        every = list(parameters)
        decayed = {"params": [p for p in every if p.dim() >= 2], "weight_decay": 0.1}
        others = {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0}
        return torch.optim.AdamW([decayed, others], lr, betas=(0.9, 0.99))

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Return the learning rate schedule, or None if the rate is constant."""
        if self.optimizer == "sgd":
            return None
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)

    def share(self, step: int) -> float:
        """Return the learning rate at a step, as a fraction of the peak rate."""
        return share_of_peak(step, max(1, min(_LONGEST, round(_WARM_UP * self.steps))), self.steps)


CONSTANT = Recipe()  # the paper's recipe: SGD with a constant step size


def share_of_peak(step: float, warm_up: float, end: float) -> float:
    """Return the learning rate at a step, counted from 0, as a fraction of the peak rate.

    The rate rises linearly for `warm_up` steps, then falls by half a cosine to a tenth at step `end`. The race does not
    use the library's schedule, so that its results stay comparable if the library changes.
    """
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1.0, end - warm_up)) if step > warm_up else 0.0
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2
