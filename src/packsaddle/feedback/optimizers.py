"""Hooks on the steps of any torch optimizer, also one that a framework or a GradScaler steps."""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


def innermost(optimizer: Any) -> Optimizer:
    """Return the optimizer that steps, in what a framework has wrapped around it (Accelerate's has no hooks).

    Raises TypeError if there is none.
    """
    while not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer):
            what = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch optimizer, got {what}")
        optimizer = inner
    return optimizer


def on_attempts(
    inner: Optimizer,
    scaler: torch.amp.GradScaler | None,
    before: Callable[[], None],
    after: Callable[[], None],
) -> None:
    """Call `before` ahead of each step of an optimizer, and `after` each attempted step.

    With a GradScaler each call of its `step` is an attempt, so that workers count the same steps if one of them skips
    one; then `before` is called only for steps that are applied. Neither is compiled into the graph of an optimizer.
    Raises TypeError if `scaler` is not a GradScaler.
    """
    outside: Any = torch.compiler.disable
    inner.register_step_pre_hook(outside(lambda optimizer, args, kwargs: before()))
    if scaler is None:
        inner.register_step_post_hook(outside(lambda optimizer, args, kwargs: after()))
        return
    if not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")
    # A skipped step need not call the optimizer, nor its hooks, so attempts are counted at the scaler.
    step = scaler.step

    def attempt(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = step(optimizer, *args, **kwargs)
        if innermost(optimizer) is inner:
            after()
        return result

    scaler.step = attempt  # type: ignore[method-assign]
