"""The common interface of `CompressedSGD`, the hooks and `LocalUpdates`, and registries of what they exchange: the
optimizers whose updates, and the parameters whose gradients.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from packsaddle.feedback.optimizers import with_members
from packsaddle.feedback.state import State

CheckpointCall = Literal["saves a checkpoint", "loads a checkpoint"]


class Exchanging:
    """Base class of an object that exchanges updates of parameters with other workers, and saves its state.

    If its list `optimizers` is not empty, these optimizers step on each worker separately. Their states and the
    parameters then differ between workers until the next exchange. If the list is empty, parameters and optimizer
    states are identical on all workers.
    """

    saved_state: State
    optimizers: Sequence[Optimizer] = ()

    def check_call(self, call: CheckpointCall) -> None:
        """Check that all workers make the same call to save or load a checkpoint. No-op except in `LocalUpdates`. There
        it is collective, and raises RuntimeError on all workers if the calls differ."""

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load_state_dict` would reject `state`.

        The message names the first entry that is missing or does not match this object.
        """
        self.saved_state.validate(state)

    def for_resharding(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return one worker's saved state in the form in which states are averaged over the workers that saved them.
        `state` does not change."""
        return state

    def weight_in(self, state: Mapping[str, Any]) -> float:
        """Return the weight, in means over workers, of the worker that saved `state`.

        The mean of all workers' weights is 1.
        """
        return 1.0


_registered: WeakKeyDictionary[Optimizer, ref[Exchanging]] = WeakKeyDictionary()


def register_exchange(exchange: Exchanging, optimizers: Iterable[Optimizer]) -> None:
    """Register `exchange` as the object that `exchange_of` returns for each of these optimizers, and for the members of
    each `CompositeOptimizer` among them.

    Copies of the optimizers are not registered.
    """
    _registered.update((optimizer, ref(exchange)) for optimizer in with_members(optimizers))


def exchange_of(optimizer: object) -> Exchanging | None:
    """Return the object that exchanges the updates of an optimizer.

    It may be the optimizer itself. Returns None if the updates are not exchanged.
    """
    if isinstance(optimizer, Exchanging):
        return optimizer
    found = _registered.get(optimizer) if isinstance(optimizer, Optimizer) else None
    return None if found is None else found()


_hooked: Any = WeakTensorKeyDictionary()


def register_hook(hook: Exchanging, parameters: Iterable[Tensor]) -> None:
    """Register `hook` as the hook that exchanges the gradients of these parameters."""
    for p in parameters:
        _hooked[p] = ref(hook)


def has_hook(parameters: Iterable[Tensor]) -> bool:
    """Return True if a hook of packsaddle exchanges the gradients of one of these parameters."""
    return any(p in _hooked and _hooked[p]() is not None for p in parameters)
