"""Hooks on the steps of one or several torch optimizers, including steps made by a framework or a GradScaler."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from packsaddle.comm.sharding import as_shard, local_part


def innermost(optimizer: Any) -> Optimizer:
    """Return the torch optimizer inside a framework's wrappers, since these may not run step hooks. Raises TypeError if
    there is none."""
    while not isinstance(optimizer, Optimizer) or isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        inner = getattr(optimizer, "optimizer", None)
        # A learning-rate scheduler has an attribute `optimizer` too, but is not a wrapper.
        if not isinstance(inner, Optimizer) or isinstance(optimizer, LRScheduler):
            what = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else type(optimizer).__name__
            raise TypeError(f"optimizer must be a torch optimizer, got {what}")
        optimizer = inner
    return optimizer


class CompositeOptimizer(Optimizer):
    """An optimizer whose step runs the steps of several optimizers, its `members`. Its parameter groups and states are
    those of the members."""

    members: Sequence[Optimizer]


def with_members(optimizers: Iterable[Optimizer]) -> Iterator[Optimizer]:
    """Yield each optimizer, and after a `CompositeOptimizer` its members."""
    for optimizer in optimizers:
        yield optimizer
        if isinstance(optimizer, CompositeOptimizer):
            yield from optimizer.members


def as_optimizers(given: object) -> tuple[Optimizer, ...]:
    """Return one optimizer or a list of them as a tuple of torch optimizers, without a framework's wrappers. Raises
    TypeError for any other object, and ValueError for an empty list, a duplicate, or a parameter in two optimizers."""
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
    """Return the shape of the i-th parameter of an optimizer's group, and its name in brackets if the group has one."""
    names = group.get("param_names")
    return f"{list(group['params'][i].shape)}" + (f" ({names[i]})" if names else "")


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def check_groups(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """Raise ValueError unless the groups of a state dict have as many parameters as the groups of the optimizer."""
    both = optimizer.param_groups, state.get("param_groups", optimizer.param_groups)
    here, saved = ([len(group["params"]) for group in groups] for groups in both)
    if here != saved:
        raise ValueError(f"{type(optimizer).__name__} has groups of {here} parameters, and the state of {saved}")


def local_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict with the local shard in place of each DTensor. `load_states` loads it in a
    process that has the same shards."""
    return dict(tree_map_only(Tensor, local_part, optimizer.state_dict()))


def load_states(optimizers: Sequence[Optimizer], states: Sequence[Mapping[str, Any]]) -> None:
    """Load one state dict per optimizer. Raises ValueError, with nothing changed,
    if the states do not match the optimizers."""
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
    """Return True for a step by which torch.distributed.checkpoint makes the state of an optimizer that has none.

    That step sets the learning rates and gradients to 0, and calls `step(closure=None)`, while training calls `step()`
    or passes a closure. A first step of training that calls `step(closure=None)` with learning rates of 0 is mistaken
    for it. Gradients are not checked, so that the result is identical on all workers.
    """
    rates = [group.get("lr", 1.0) for group in optimizer.param_groups]
    return kwargs == {"closure": None} and not optimizer.state and all(rate == 0 for rate in rates)


class Attempts:
    """Counts the steps of one or several optimizers, and calls `after` once each of them has attempted a step.

    `before(optimizer)` is called before each optimizer's step. With a GradScaler each call of its `step` is an attempt,
    even if it skips the optimizer, so that all workers count the same steps; `before` is then called for applied steps
    only. An optimizer without gradients, for which a scaler raises an error, may step without the scaler. Steps by
    which torch's checkpoints make an optimizer's state do not count. Raises TypeError if `scaler` is not a GradScaler,
    and RuntimeError at a step that bypasses the scaler.
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
        self._stepped = list[Optimizer]()  # optimizers that have attempted the current step; empty between two steps
        outside: Any = torch.compiler.disable
        self.scaler, self._in_scaler = scaler, False  # the flag is True during a call of the scaler's `step`
        self._counts = True  # False during a step that does not count as an attempt
        self.are_discarded = False  # True if the gradients of the current step were set to None

        def begin(optimizer: Optimizer, args: object, kwargs: Mapping[str, Any]) -> None:
            self._counts = not _only_makes_state(optimizer, kwargs)
            if not self._counts:
                return
            is_beside = scaler is not None and not self._in_scaler
            if is_beside and any(p.grad is not None for p in parameters_of([optimizer])):
                name = type(optimizer).__name__
                raise RuntimeError(f"{name} steps without the GradScaler given as scaler: call scaler.step(...)")
            before(optimizer)

        def end(optimizer: Optimizer, args: object, kwargs: object) -> None:
            if self._counts and not self._in_scaler:
                self._attempted(optimizer)

        for optimizer in optimizers:
            optimizer.register_step_pre_hook(outside(begin))
            optimizer.register_step_post_hook(outside(end))
        if scaler is None:
            return
        # Count the calls of the scaler's `step`: if it skips a step, it may call neither the optimizer nor its hooks.
        step = scaler.step

        def attempt(optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            # The scaler would raise an error for an optimizer whose gradients were discarded, so count the attempt
            # without it.
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
        """Return the names of the optimizers that have not attempted the current step, or "" between two steps."""
        return " and ".join(type(o).__name__ for o in self._optimizers if self._stepped and o not in self._stepped)

    def restart(self) -> None:
        """Discard the record of the optimizers that have attempted the current step, for example after loading a state.
        The next attempt then begins a new step."""
        self._stepped.clear()
        self.are_discarded = False
