"""The common interface of `CompressedSGD`, hooks and `LocalUpdates`, and a registry that maps each optimizer to the
object that exchanges its updates."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

from torch.optim import Optimizer

from packsaddle.feedback.optimizers import with_members
from packsaddle.feedback.state import State

CheckpointCall = Literal["saves a checkpoint", "loads a checkpoint"]


class Exchanging:
    """Base class of an object that exchanges updates of parameters with other workers, and saves its state.

    If it has `optimizers`, these step on each worker separately: between two exchanges, their states and parameters
    differ between workers. If it has none, parameters and optimizer states are identical on all workers.
    """

    saved_state: State
    optimizers: Sequence[Optimizer] = ()

    def check_call(self, call: CheckpointCall) -> None:
        """Check that all workers make the same call to save or load a checkpoint. No-op except in `LocalUpdates`, which
        raises RuntimeError on all workers if one makes a different call."""

    def check_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError if `load_state_dict` would reject `state`. The error names the first entry that does not
        fit."""
        self.saved_state.validate(state)

    def weight_in(self, state: Mapping[str, Any]) -> float:
        """Return the weight that the worker that saved `state` has in means over workers. Weights are 1 on average."""
        return 1.0


_registered: WeakKeyDictionary[Optimizer, ref[Exchanging]] = WeakKeyDictionary()


def register_exchange(exchange: Exchanging, optimizers: Iterable[Optimizer]) -> None:
    """Make `exchange_of` return `exchange` for these optimizers and for the members of each `CompositeOptimizer`, but
    not for copies of them."""
    _registered.update((optimizer, ref(exchange)) for optimizer in with_members(optimizers))


def exchange_of(optimizer: object) -> Exchanging | None:
    """Return the object that exchanges an optimizer's updates, which may be the optimizer itself. Returns None if the
    updates are not exchanged."""
    if isinstance(optimizer, Exchanging):
        return optimizer
    found = _registered.get(optimizer) if isinstance(optimizer, Optimizer) else None
    return None if found is None else found()
