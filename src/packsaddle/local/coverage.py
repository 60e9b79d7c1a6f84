"""Parameters of a model that local updates do not exchange: an error where the model is given, else a warning."""

import gc
import warnings
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from packsaddle.comm.group import Group, is_averaged_by_ddp


def check_covers(parameters: Iterable[Tensor], model: nn.Module) -> None:
    """Raise ValueError if a model has parameters that require gradients and are not among these."""
    known = {id(p) for p in parameters}
    if missed := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
        raise ValueError(
            f"optimizer must have all parameters of model that require gradients, but {_some(missed)} would be trained "
            f"by each worker alone: add them to the optimizer, or freeze them (requires_grad_(False))"
        )


class OtherOptimizers:
    """The other optimizers that have stepped in this process, and the parameters that they train.

    `warn` warns, once and on rank 0, if some of these are not exchanged and share a module with `parameters`.
    """

    def __init__(self, parameters: Sequence[Tensor], group: Group) -> None:
        self._ours, self._group = parameters, group
        self._stepped: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()  # ids of the parameters stepped
        self._has_new = False  # there is an optimizer that `warn` has not checked
        _watches.add(self)

    def note(self, optimizer: Optimizer) -> None:
        """Record an optimizer that has stepped, and the parameters of its first step."""
        if optimizer not in self._stepped:
            trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._stepped[optimizer] = {id(p) for p in trained}
            self._has_new = True

    def warn(self) -> None:
        """Warn if an optimizer that has stepped since the last call trains parameters that nothing exchanges."""
        if not self._has_new:
            return
        self._has_new = False
        # Parameters in one module with ours that no optimizer exchanges: a DistributedDataParallel may average them.
        alone = {o: ids for o, ids in self._stepped.items() if not _is_exchanged(o)}
        ours, theirs = {id(p) for p in self._ours}, set[int]().union(*alone.values())
        found = _beside(ours, theirs - ours) if theirs - ours else {}
        if not found or is_averaged_by_ddp(found.values(), self._group):
            return
        _watches.all.discard(self)  # once is enough
        if self._group.rank:
            return
        names = ", ".join(sorted({type(o).__name__ for o in alone}))
        warnings.warn(
            f"LocalUpdates exchanges the parameters of one optimizer, but {names} trains others of the model, which no "
            f"worker sends: {_some(list(found))}. They differ between workers: put all in one optimizer, or give each "
            f"optimizer LocalUpdates of its own",
            stacklevel=2,
        )


class _Watches:
    """All `OtherOptimizers`, notified of steps by torch's one hook for all optimizers.

    The hook stays: torch may be calling its hooks while a garbage collection would remove it.
    """

    def __init__(self) -> None:
        self.all: WeakSet[OtherOptimizers] = WeakSet()
        self._is_registered = False

    def add(self, watch: OtherOptimizers) -> None:
        self.all.add(watch)
        if not self._is_registered:
            outside: Any = torch.compiler.disable
            register_optimizer_step_post_hook(outside(self.note))
            self._is_registered = True

    def note(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for watch in list(self.all):
            watch.note(optimizer)


_watches = _Watches()


def _is_exchanged(optimizer: Optimizer) -> bool:
    """Return True if local updates exchange an optimizer's steps, or the optimizer does so itself."""
    return getattr(optimizer, "exchanged_by", None) is not None or hasattr(optimizer, "channel")


def _beside(ours: set[int], theirs: set[int]) -> dict[str, Tensor]:
    """Return those of their parameters that are in a module together with one of ours, by name, all given by ids.

    The script alone may know the module, so all objects are looked through (0.1 s).
    """
    modules = [found for found in gc.get_objects() if issubclass(type(found), nn.Module)]
    inner = {id(child) for module in modules for child in (getattr(module, "_modules", None) or {}).values()}
    for root in modules:
        named = {} if id(root) in inner else dict(root.named_parameters())
        if not ours.isdisjoint(map(id, named.values())):
            found = {name: p for name, p in named.items() if id(p) in theirs and p.requires_grad}
            if found:
                return found
    return {}


def _some(names: Sequence[str]) -> str:
    """Return up to three names, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
