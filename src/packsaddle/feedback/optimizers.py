"""Hooks on the steps of one or several torch optimizers, including steps that a framework or a GradScaler makes."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from packsaddle.comm.sharding import as_shard, local_part


def innermost(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside the wrappers of a framework. Step hooks are registered on it, since wrappers
    may not run them.

    Raises TypeError if there is no torch optimizer inside.
    """
    while not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        # A learning-rate scheduler has an attribute `optimizer` too, but is not a wrapper.
        if not isinstance(inner, Optimizer) or isinstance(optimizer, LRScheduler):
            what = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch optimizer, got {what}")
        optimizer = inner
    return optimizer


class CompositeOptimizer(Optimizer):
    """Base class of an optimizer that combines several optimizers, its `members`, whose steps it runs in its own step.

    Its parameter groups and states are those of the members.
    """

    members: Sequence[Optimizer]


def with_members(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """Yield the optimizers. Each `CompositeOptimizer` is followed by its members."""
    for optimizer in optimizers:
        yield optimizer
        if isinstance(optimizer, CompositeOptimizer):
            yield from optimizer.members


def as_optimizers(given: object) -> tuple[Optimizer, ...]:
    """Return a tuple of the torch optimizers in `given`: one optimizer, or a list of optimizers. A framework's wrappers
    are removed.

    Raises TypeError if `given` is neither an optimizer nor a list of optimizers. Raises ValueError for an empty list,
    if an optimizer is given twice, or if two optimizers have a parameter in common.
    """
    if isinstance(given, Iterable) and not isinstance(given, list | tuple):
        kind = type(given).__name__
        raise TypeError(f"optimizer must be a torch optimizer, or a list of them such as [muon, adamw], got a {kind}")
    found = tuple(innermost(optimizer) for optimizer in (given if isinstance(given, list | tuple) else [given]))
    if not found:
        raise ValueError("optimizer must be a torch optimizer or a list of them, and the list is empty")
    for i, optimizer in enumerate(found):
        if optimizer in found[:i]:
            raise ValueError(f"optimizers must be different, and one {type(optimizer).__name__} is given twice")
    whose: dict[int, Optimizer] = {}
    for optimizer in found:
        for group in optimizer.param_groups:
            for i, p in enumerate(group["params"]):
                other = whose.setdefault(id(p), optimizer)
                if other is not optimizer:
                    both = f"{type(other).__name__} and {type(optimizer).__name__}"
                    one = shape_and_name(group, i)
                    raise ValueError(f"optimizers must have no parameter in common, but {both} have one of {one}")
    return found


def shape_and_name(group: Mapping[str, Any], i: int) -> str:
    """Return a text for messages: the shape of the i-th parameter of a parameter group, and its name in brackets if the
    group has names."""
    names = group.get("param_names")
    return f"{list(group['params'][i].shape)}" + (f" ({names[i]})" if names else "")


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def check_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ValueError if the parameter groups in `state`, a state dict, differ in number or size from those of the
    optimizer."""
    both = optimizer.param_groups, state.get("param_groups", optimizer.param_groups)
    here, saved = ([len(group["params"]) for group in groups] for groups in both)
    if here != saved:
        raise ValueError(f"{type(optimizer).__name__} has groups of {here} parameters, and the state of {saved}")


def local_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict, with each DTensor replaced by its local shard.

    `load_states` can load it in a process that has the same shards.
    """
    return dict(tree_map_only(Tensor, local_part, optimizer.state_dict()))


def load_states(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]) -> None:
    """Load a state dict into each optimizer, in the given order.

    Raises ValueError, with nothing changed, if the number of states or the sizes of their parameter groups do not
    match.
    """
    if len(states) != len(optimizers):
        raise ValueError(f"the state is of {len(states)} optimizers, and here are {len(optimizers)}")
    for optimizer, state in zip(optimizers, states, strict=True):
        check_groups(optimizer, state)
    for optimizer, state in zip(optimizers, states, strict=True):
        found = dict(state.get("state", {}))
        for here, saved in zip(optimizer.param_groups, state.get("param_groups", ()), strict=False):
            for p, i in zip(here["params"], saved["params"], strict=True):
                if i in found and hasattr(p, "device_mesh"):
                    found[i] = {key: as_shard(value, p) for key, value in found[i].items()}
        optimizer.load_state_dict({**state, "state": found})


def check_scaler(scaler: object) -> None:
    if not (scaler is None or isinstance(scaler, torch.amp.GradScaler)):
        raise TypeError(f"scaler must be a torch.amp.GradScaler, got {type(scaler).__name__}")


def _only_makes_state(optimizer: Optimizer, kwargs: Mapping[str, Any]) -> bool:
    """Return True for a step by which torch.distributed.checkpoint makes the state of an optimizer that has no state
    yet.

    Before this step, torch sets the learning rates and gradients to 0, and it calls `step(closure=None)`. Training
    calls `step()`, or passes a closure. If the first step of training calls `step(closure=None)` with learning rates of
    0, the result is wrongly True. Gradients are not checked, so that the result is identical on all workers.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    return kwargs == {"closure": None} and not optimizer.state and all(rate == 0 for rate in rates)


def _several_steps(optimizer: Optimizer) -> bool:
    """Return True if several classes of an optimizer define `step`, as those of a subclass whose `step` calls
    `super().step()`."""
    return sum("step" in vars(each) for each in type(optimizer).__mro__ if each is not Optimizer) > 1


class Attempts:
    """Counts the steps of one or several optimizers.

    Args:
        optimizers: the optimizers. A step is complete, and counts, when each of them has attempted it.
        scaler: the GradScaler that calls the optimizers' steps, or None.
        before: called with the optimizer before each of its steps. If a scaler skips a step, it is not called.
        after: called when all optimizers have attempted the step.

    With a scaler, each call of the scaler's `step` is an attempt, even if it skips the step, so that all workers count
    the same steps. An optimizer without gradients, for which a scaler would raise an error, may step without the
    scaler. The steps by which torch's checkpoints make the state of an optimizer do not count. A step that calls
    `super().step()` counts once.

    Raises TypeError if `scaler` is not a GradScaler. A step of an optimizer that has gradients raises RuntimeError if
    it bypasses the scaler.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        scaler: torch.amp.GradScaler | None,
        before: Callable[[Optimizer], None],
        after: Callable[[], object],
    ) -> None:
        check_scaler(scaler)
        self._optimizers, self._after = optimizers, after
        # Optimizers that have attempted the current step; empty: no optimizer has begun it.
        self._stepped = list[Optimizer]()
        outside: Any = torch.compiler.disable
        self.scaler, self._in_scaler = scaler, False  # `_in_scaler` is True during a call of the scaler's `step`
        self._counts = True  # False during a step that does not count, since it only makes the optimizer's state
        self.are_discarded = False  # True if the gradients of the current step were set to None

        # For optimizers with several steps, the number of those that have begun and not ended, by the optimizer's id.
        self._begun = {id(optimizer): 0 for optimizer in optimizers if _several_steps(optimizer)}

        def begin(optimizer: Optimizer, args: object, kwargs: Mapping[str, Any]) -> None:
            if self._is_inner(optimizer, 1):
                return
            self._counts = not _only_makes_state(optimizer, kwargs)
            if not self._counts:
                return
            is_beside = scaler is not None and not self._in_scaler
            if is_beside and any(p.grad is not None for p in parameters_of([optimizer])):
                name = type(optimizer).__name__
                raise RuntimeError(f"{name} steps without the GradScaler given as scaler: call scaler.step(...)")
            before(optimizer)

        def end(optimizer: Optimizer, args: object, kwargs: object) -> None:
            if not self._is_inner(optimizer, -1) and self._counts and not self._in_scaler:
                self._attempted(optimizer)

        for optimizer in optimizers:
            optimizer.register_step_pre_hook(outside(begin))
            optimizer.register_step_post_hook(outside(end))
            if id(optimizer) in self._begun:
                self._renew_in_each_step(optimizer)
        if scaler is None:
            return
        # Count the calls of the scaler's `step`. A scaler that skips a step may call neither the optimizer nor its
        # hooks.
        step = scaler.step

        def attempt(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            # The scaler would raise an error for an optimizer without gradients. So if gradients were discarded, count
            # the optimizer's attempt at a step, and do not call the scaler.
            if self.are_discarded and innermost(optimizer) in self._optimizers:
                self._attempted(innermost(optimizer))
                return None
            self._in_scaler = True
            try:
                result = step(optimizer, *args, **kwargs)
            finally:
                self._in_scaler = False
            if (inner := innermost(optimizer)) in self._optimizers:
                self._attempted(inner)
            return result

        scaler.step = attempt  # type: ignore[method-assign]

    def _renew_in_each_step(self, optimizer: Optimizer) -> None:
        """Replace `optimizer.step` by a method that also forgets the steps of an earlier call that raised an error."""
        step = optimizer.step

        @wraps(step)
        def renewed(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._begun[id(optimizer)] = 0
            return step(*args, **kwargs)

        optimizer.step = MethodType(renewed, optimizer)  # type: ignore[method-assign]

    def _is_inner(self, optimizer: Optimizer, change: int) -> bool:
        """Note that a step of the optimizer begins (`change` 1) or ends (-1), and return True if another step of the
        same call has not ended. torch runs the hooks also for a `super().step()` in a subclass's `step`."""
        if id(optimizer) not in self._begun:
            return False
        self._begun[id(optimizer)] += change
        return self._begun[id(optimizer)] > max(change, 0)

    def _attempted(self, optimizer: Optimizer) -> None:
        if optimizer in self._stepped:
            hint = "" if self.scaler is not None else ", and pass scaler= if a GradScaler skips steps"
            raise RuntimeError(
                f"{type(optimizer).__name__} has stepped twice and {self.missing()} not: a step counts when all "
                f"optimizers have taken theirs, so step each of them every time{hint}"
            )
        self._stepped.append(optimizer)
        if len(self._stepped) == len(self._optimizers):
            self.restart()
            self._after()

    def missing(self) -> str:
        """Return the names of the optimizers that have not attempted the current step yet, joined by "and".

        Returns "" if no optimizer has begun the step.
        """
        return " and ".join(type(o).__name__ for o in self._optimizers if self._stepped and o not in self._stepped)

    def restart(self) -> None:
        """Begin a new step: clear the list of optimizers that have attempted the current one. Call, for example, after
        a state was loaded."""
        self._stepped.clear()
        self.are_discarded = False
