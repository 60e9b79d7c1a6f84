"""The escape check for a gradient hook: lines 4-8 of Algorithm 1 after each step of plain SGD."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from packsaddle.feedback.escape import Escape, EscapeCheck
from packsaddle.feedback.slices import FlatParameters, Place
from packsaddle.feedback.state import ANY, Value, Vector
from packsaddle.hooks.ddp_hook import DDPHook, Rates, are_plain_sgd


class EscapeAfterStep:
    """Runs the escape check after each step of plain SGD with a gradient hook.

    The check needs y = x - eta e, which is correct for plain SGD only, so any other optimizer raises ValueError. The
    parameters are moved into one flat tensor.
    """

    def __init__(
        self,
        rule: Escape,
        hook: DDPHook,
        optimizer: Optimizer | None,
        places: Sequence[Place],
        rates: Rates,
        *,
        dense_below: int,
        seed: int,
    ) -> None:
        if optimizer is None or not are_plain_sgd([optimizer]):
            raise ValueError(
                "escape needs optimizer=, a torch.optim.SGD without momentum or maximize: lines 4-8 compare "
                f"y = x - eta e, and what an error e will do to x is known for no other; got {type(optimizer).__name__}"
            )
        names, parameters = [p.name for p in places], [p.parameter for p in places]
        self._flat = FlatParameters([{"params": parameters, "param_names": names}], dense_below)
        self._check = EscapeCheck(rule, self._flat.x, self._flat.compressed_d, hook.channel, seed)
        self._hook, self._places, self._rates = hook, places, rates
        self._checked = hook.steps
        self._has_begun = False
        optimizer.register_step_pre_hook(self._before)
        optimizer.register_step_post_hook(self._after)

    @torch.no_grad()
    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._has_begun:
            self._check.begin()
            self._has_begun = True

    @torch.no_grad()
    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        steps = self._hook.steps
        if steps == self._checked:  # the exchange was rejected
            return
        self._checked = steps
        self._flat.check_attached()
        # This worker's unsent update eta e, since the hook's memory is in units of a gradient.
        memory = self._hook.memory()
        rates = self._rates.now()
        pending = torch.zeros_like(self._flat.x, dtype=torch.promote_types(self._flat.x.dtype, torch.float32))
        for place, view in zip(self._places, self._flat.views(pending), strict=True):
            view.copy_(memory[place.name]).mul_(rates[place.name])
        reset, lost = self._check.run(steps, pending)
        if reset is None:
            return
        # Line 7: set the error memory to 0, or to x's rounding error, in units of a gradient.
        left = {}
        if lost is not None:
            for place, view in zip(self._places, self._flat.views(lost), strict=True):
                left[place.name] = view / (rates[place.name] or 1.0)
        self._hook.forget(left)
        self._hook.resets.append(reset)

    def fields(self) -> list[Vector | Value]:
        """Return fields for the hook's saved state: the segment's start point and step. Load after the hook's steps."""
        anchor = self._flat.by_name(self._check.anchor)
        shapes = {name: view.shape for name, view in anchor.items()}
        return [
            Vector(("escape", "anchor", ANY), shapes, lambda: anchor),
            Value(("escape", "step"), int, lambda: self._check.anchor_step, self._resume),
        ]

    def _resume(self, anchor_step: int) -> None:
        self._check.anchor_step, self._checked, self._has_begun = anchor_step, self._hook.steps, True
