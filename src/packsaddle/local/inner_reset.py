"""Resets the inner optimizer of a worker whose parameters were not finite, wherever the optimizer keeps its state.

Non-finite entries are cleared from its own state and from that of the optimizers it wraps. If a step with finite
gradients still makes a parameter non-finite, the optimizer has state elsewhere, and its `state_dict` is cleared and
loaded back. If that does not help either, the optimizer cannot be reset.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import local_part
from packsaddle.numerics.finite import is_finite

_log = logging.getLogger("packsaddle")


class InnerReset:
    """Resets an inner optimizer, and checks its steps until the local updates that were rejected are finite again.

    `agree` returns whether a bool[] is True on any shard of this worker; collective over the shards.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor], agree: Callable[[Tensor], Tensor]) -> None:
        self._optimizer, self._parameters, self._agree = optimizer, parameters, agree
        self._device = local_part(parameters[0]).device
        self.rejected = set[object]()  # fragments without a finite local update since their last one was rejected
        self._reloaded = False  # the state dict was cleared since `rejected` was empty
        self.failed = False  # x became non-finite after that too, by a step with finite gradients

    def reset(self, fragment: object) -> None:
        """Clear non-finite state, after a round of a fragment was rejected; the caller makes x finite."""
        self._clear()
        self.rejected.add(fragment)

    def end(self, fragment: object) -> None:
        """Register a finite local update of a fragment. Checks of steps end when `rejected` is empty."""
        self.rejected.discard(fragment)
        if not self.rejected:
            self._reloaded = self.failed = False

    def reset_again(self) -> bool:
        """Clear the state dict as well if gradients are finite and x is not; the caller makes x finite.

        Call after each step while `rejected` is not empty. Returns True if the state dict was cleared. The second time
        it sets `failed` instead. Collective over the shards.
        """
        trained = [p for p in self._parameters if p.requires_grad]
        gradients = [p.grad for p in trained if p.grad is not None]
        if self.failed or not self.are_finite(gradients) or self.are_finite(trained):
            return False
        if self._reloaded:
            self.failed = True
            return False
        self._clear()
        reload_finite(self._optimizer)
        self._reloaded = True
        return True

    def _clear(self) -> None:
        self.failed = False
        for optimizer in nested(self._optimizer):
            clear_nonfinite(optimizer)

    def are_finite(self, tensors: Iterable[Tensor]) -> bool:
        """Return True if tensors are finite on all shards of this worker; collective over them."""
        here = all(bool(is_finite(local_part(t))) for t in tensors)
        return not bool(self._agree(torch.tensor(not here, device=self._device)))


def nested(optimizer: Optimizer) -> list[Optimizer]:
    """Return an optimizer and those it wraps: in its attributes, or in lists, tuples, sets and dicts there."""
    found: list[Optimizer] = []
    seen, waiting = set[int](), list[Any]([optimizer])
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Optimizer):
            found.append(value)
            waiting += [v for name, v in vars(value).items() if name not in ("state", "param_groups", "defaults")]
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple | set):
            waiting += value
    return found


def clear_nonfinite(optimizer: Optimizer) -> None:
    """Delete the state of parameters of which it is non-finite, as before their first step.

    Non-finite values of parameter groups become the defaults; tensors that have no default become 0.
    """
    for p in [p for p, entry in optimizer.state.items() if not _all_finite(entry)]:
        del optimizer.state[p]
    for group in optimizer.param_groups:
        for name, value in [(n, v) for n, v in group.items() if n != "params" and not _all_finite(v)]:
            default = optimizer.defaults.get(name)
            if not isinstance(default, int | float) or not math.isfinite(default):
                default = None
            if isinstance(value, Tensor):
                value.fill_(default or 0.0)
            elif default is not None:
                group[name] = default


def reload_finite(optimizer: Optimizer) -> None:
    """Clear non-finite tensors from an optimizer's state dict, and load it back. Errors are logged."""
    try:
        state = optimizer.state_dict()
        if not _all_finite(state):
            optimizer.load_state_dict(_finite_part(state))
    except Exception:  # the other workers wait for this one; its next round reports that x is still non-finite
        _log.warning("the state of %s could not be reset", type(optimizer).__name__, exc_info=True)


def _finite_part(value: Any, name: Any = None) -> Any:
    """Return a copy without the entries of a "state" that are non-finite, and with 0 in other non-finite tensors."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if name != "state" or _all_finite(v)}
        return {k: _finite_part(v, k) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        parts = [_finite_part(v) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    return torch.zeros_like(value) if isinstance(value, Tensor) and not _all_finite(value) else value


def _all_finite(value: Any) -> bool:
    """Return True unless a tensor within is non-finite, or a number NaN: an infinite one may be a setting."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(is_finite(local_part(value)))
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not (isinstance(value, float) and math.isnan(value))
