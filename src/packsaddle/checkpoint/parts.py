"""Validation and loading of the parts of a checkpoint, i.e. objects with a state_dict. Either all parts are loaded, or
none is."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from packsaddle.checkpoint.files import CheckpointError, DamagedError
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.feedback.exchanging import CheckpointCall, Exchanging, exchange_of
from packsaddle.feedback.optimizers import check_groups

T = TypeVar("T")


class Part(Protocol):
    """Interface of a part of a checkpoint, such as a model, an optimizer, a hook, a scheduler or a GradScaler."""

    def state_dict(self) -> Any:
        """Return the state as tensors and plain types."""

    def load_state_dict(self, state_dict: Any) -> Any:
        """Restore the state from the argument, a result of the method `state_dict`."""


Parts = Mapping[str, Part]


def check_parts(parts: Parts, call: CheckpointCall) -> None:
    """Raise CheckpointError for invalid `parts`, for an optimizer whose `LocalUpdates` is not a part, and for a
    `LocalUpdates` if only some of its optimizers are parts. If a part is a `LocalUpdates`, the check is collective: it
    raises RuntimeError if the workers' calls differ, for example because only rank 0 saves a checkpoint."""
    if not isinstance(parts, Mapping):
        raise CheckpointError(f'parts must be by name, such as {{"model": model}}, got a {type(parts).__name__}')

    # Check each part. Check also that either all optimizers of a `LocalUpdates` are parts, or none is.
    held = {id(each) for part in parts.values() for each in _unwrapped(part)}
    for name, part in parts.items():
        if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
            raise CheckpointError(f"part {name!r} must have state_dict and load_state_dict, got {type(part).__name__}")
        exchange = exchange_of(part)
        if exchange is not None and id(exchange) not in held:
            raise CheckpointError(
                f'part {name!r} is an optimizer with LocalUpdates, which must be a part as well: "local": local'
            )
        optimizers = part.optimizers if isinstance(part, Exchanging) else ()
        missing = [type(optimizer).__name__ for optimizer in optimizers if id(optimizer) not in held]
        if 0 < len(missing) < len(optimizers):
            raise CheckpointError(f"part {name!r} is LocalUpdates, and its {missing[0]} must be a part as well")

    # If a part is a `LocalUpdates`, check that all workers make the same call to save or load a checkpoint.
    for part in parts.values():
        if isinstance(part, Exchanging):
            part.check_call(call)


def _unwrapped(part: Any) -> Iterator[Any]:
    """Yield `part`, an object whose state a checkpoint contains. If `part` wraps an optimizer, i.e. has an attribute
    `optimizer`, then also yield the wrapped optimizer, and any optimizer that the wrapped optimizer wraps."""
    while part is not None:
        yield part
        part = getattr(part, "optimizer", None)


def modules(parts: Parts) -> list[str]:
    return [name for name, part in parts.items() if isinstance(part, nn.Module)]


def shapes(state: Mapping[str, Any]) -> dict[str, str]:
    """Return the dtype and shape of each tensor in a module's state, such as {"weight": "float32[64, 64]"}."""
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    return {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in tensors.items()}


def device_of(parts: Parts) -> torch.device:
    for part in parts.values():
        held = [g["params"] for g in part.param_groups] if isinstance(part, Optimizer) else part.state_dict()
        for leaf in tree_leaves(held):
            if isinstance(leaf, Tensor):
                return leaf.device
    return torch.device("cpu")


def check_shapes(part: str, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    for name, shape in here.items():
        if saved.get(name) != shape:
            raise CheckpointError(f"{part}: {name} is {shape} here, but {saved.get(name, 'not')} in the checkpoint")
    for name in saved:
        if name not in here:
            raise CheckpointError(f"{part} has no {name} here, but it is in the checkpoint")


def check_names(parts: Parts, state: Mapping[str, Any]) -> None:
    if parts.keys() != state.keys():
        here, there = ", ".join(sorted(parts)), ", ".join(sorted(state))
        raise CheckpointError(f"the parts are {here} here, but {there} in the checkpoint")


def check_fit(parts: Parts, state: Mapping[str, Any]) -> None:
    """Raise CheckpointError if `state`, the saved states by name, does not fit `parts` (the model, optimizers and other
    objects into which it will be loaded). Only differences that can be found without loading are detected."""
    check_names(parts, state)
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            check_shapes(name, shapes(state[name]), shapes(part.state_dict()))
        try:
            if isinstance(part, Exchanging):
                part.check_state_dict(state[name])
            elif isinstance(part, Optimizer):
                check_groups(part, state[name])
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from None


def load_all(parts: Parts, state: Mapping[str, Any], collectives: ObjectCollectives) -> None:
    """Load `state`, the saved states by name, into `parts` (the model, optimizers and so on) on all workers;
    collective. If one part fails to load on some worker, all parts are rolled back on all workers, and CheckpointError
    is raised."""
    before = tree_map_only(
        Tensor, lambda t: t.detach().to("cpu", copy=True), {name: part.state_dict() for name, part in parts.items()}
    )

    def load() -> None:
        for name, part in parts.items():
            try:
                part.load_state_dict(state[name])
            except Exception as error:  # an error of any type, after which all parts must be rolled back
                raise CheckpointError(f"{name}: {' '.join(str(error).split())}") from error

    try:
        run_on_all(collectives, load)
    except CheckpointError:
        for name, part in parts.items():
            part.load_state_dict(before[name])
        raise


def run_on_all(collectives: ObjectCollectives, work: Callable[[], T]) -> T:
    """Call `work` on every worker and return this worker's result; collective. If `work` raises CheckpointError on some
    workers, all workers raise one of these errors. The error raised is that of the lowest rank whose error is not a
    DamagedError. If all errors are DamagedErrors, it is that of the lowest rank with an error."""
    value, kind, problem = None, "", ""
    try:
        value = work()
    except CheckpointError as error:
        kind, problem = type(error).__name__, str(error)
    outcomes = enumerate(collectives.gather((kind, problem)))
    found = sorted((kind == DamagedError.__name__, rank, problem) for rank, (kind, problem) in outcomes if problem)
    if found:
        is_damaged, rank, problem = found[0]
        where = f"worker {rank}: " if collectives.group.size > 1 else ""
        raise (DamagedError if is_damaged else CheckpointError)(where + problem)
    return value  # type: ignore[return-value]  # `work` has returned on all workers
