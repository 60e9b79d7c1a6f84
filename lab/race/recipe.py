"""Recipes of training in a race: the inner optimizer, its learning rate over the steps, and the clipping of gradients.

"adamw" is nanoGPT's recipe: betas 0.9 and 0.99, weight decay 0.1 on matrices, gradients clipped to norm 1. "momentum"
is the usual one of image networks: SGD with momentum 0.9 and weight decay 5e-4. Both have a linear warm-up and a cosine
to a tenth. "sgd" is the paper's: one step size.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

Kind = Literal["sgd", "momentum", "adamw"]
_WARM_UP = 0.1  # of the steps, and at most _LONGEST of them
_LONGEST = 100
_LAST_SHARE = 0.1  # fraction of the peak rate at the end


@dataclass(frozen=True)
class Recipe:
    """The recipe of a training of `steps` steps."""

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
        """Return the optimizer, at its peak rate; `momentum` is for "sgd" only."""
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr, momentum=momentum)
        if self.optimizer == "momentum":
            return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=5e-4)
        every = list(parameters)
        decayed = {"params": [p for p in every if p.dim() >= 2], "weight_decay": 0.1}
        others = {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0}
        return torch.optim.AdamW([decayed, others], lr, betas=(0.9, 0.99))

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler | None:
        """Return the schedule of the rate, None for a constant one."""
        if self.optimizer == "sgd":
            return None
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self.share)

    def share(self, step: int) -> float:
        """Return the fraction of the peak rate at a step."""
        return share_of_peak(step, max(1, min(_LONGEST, round(_WARM_UP * self.steps))), self.steps)


CONSTANT = Recipe()  # the paper's


def share_of_peak(step: float, warm_up: float, end: float) -> float:
    """Return the fraction of the peak rate at a step, from 0: linear warm-up, then half a cosine to a tenth at `end`.

    The race does not use the library's schedule, so that its results stay comparable if that changes.
    """
    if step + 1 < warm_up:
        return (step + 1) / warm_up
    done = min(1.0, (step - warm_up) / max(1.0, end - warm_up)) if step > warm_up else 0.0
    return _LAST_SHARE + (1 - _LAST_SHARE) * (1 + math.cos(math.pi * done)) / 2
