"""The inner optimizers, which step on each worker separately.

This module collects the parameters of these optimizers, and checks that every parameter that one of them trains is also
exchanged.
"""

import warnings
from collections.abc import Container, Iterable, Mapping, Sequence
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from packsaddle.comm.group import Group, distinct_groups
from packsaddle.comm.modules import is_averaged_by_ddp, recorded_modules
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import Compressor, describe
from packsaddle.feedback.exchanging import Exchanging, exchange_of
from packsaddle.feedback.optimizers import parameters_of, shape_and_name, with_members
from packsaddle.feedback.slices import check_no_shared_memory
from packsaddle.local.options import LocalOptions, Workers
from packsaddle.numerics.kernels import arithmetic
from packsaddle.options.agreement import agreement


def names_of(optimizers: Iterable[Optimizer]) -> str:
    return " + ".join(type(optimizer).__name__ for optimizer in optimizers)


# Keys of a torch optimizer's settings that do not change the optimizer's steps: the parameters, and the choice of an
# implementation.
_IMPLEMENTATIONS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")


def settings_of(optimizers: Iterable[Optimizer], *, of_groups: bool) -> dict[str, object]:
    """Return the class and the settings of each optimizer as one dict, to compare the dicts of different workers. The
    keys are names such as "optimizer[0].defaults.lr".

    With `of_groups`, the settings are the current ones of the optimizer's parameter groups. Otherwise the settings are
    the optimizer's defaults. Settings other than numbers, strings, bools, None and lists of these are omitted.
    """
    found: dict[str, object] = {}
    for i, optimizer in enumerate(with_members(optimizers)):
        found[f"optimizer[{i}]"] = type(optimizer).__name__
        settings = {f"param_groups[{j}]": group for j, group in enumerate(optimizer.param_groups)}
        for name, values in (settings if of_groups else {"defaults": optimizer.defaults}).items():
            for key, value in sorted(values.items()):
                plain = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
                if key not in _IMPLEMENTATIONS and _is_plain(plain):
                    found[f"optimizer[{i}].{name}.{key}"] = plain
    return found


def equal_arguments(
    options: LocalOptions, optimizers: Sequence[Optimizer], outer: Optimizer | None, device: torch.device
) -> dict[str, object]:
    """Return the arguments of local updates that must be equal on all workers, by name."""
    spec, workers = options.compression, options.workers
    same: dict[str, object] = {"weight": _kind(workers)} if isinstance(workers, Workers) else {}
    same |= agreement(options) | {"arithmetic": arithmetic(device)}
    # Functions of the round that return a compressor cannot be compared between workers. So compare the compressors
    # that the workers' functions return for round 0.
    if not isinstance(spec.compressor, Compressor):
        same["compressor of round 0"] = describe(spec.at(0))
    same["outer"] = None if outer is None else (type(outer).__name__, outer.defaults)
    # The default of `mean_momentum` depends on the optimizers, so it is compared only if the optimizers are compared.
    fraction = same.pop("mean_momentum")
    # The current settings of elastic workers may differ: a worker that joins later may be at another point of a
    # learning-rate schedule than the other workers. So for elastic workers only the defaults are compared.
    if workers.compare_optimizers:
        same |= settings_of(optimizers, of_groups=isinstance(workers, Workers)) | {"mean_momentum": fraction}
    return same


def _kind(workers: Workers) -> str | bool:
    return "steps" if workers.weight == "steps" else workers.weight is not None


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def check_not_exchanged(optimizers: Iterable[Optimizer]) -> None:
    """Raise TypeError for an optimizer that exchanges its updates itself, and RuntimeError for one whose updates
    another `LocalUpdates` exchanges, since workers would exchange each change twice."""
    for optimizer in with_members(optimizers):
        name = type(optimizer).__name__
        if isinstance(optimizer, Exchanging):
            raise TypeError(f"optimizer must step on this worker alone, and {name} exchanges by itself")
        if exchange_of(optimizer) is not None:
            raise RuntimeError(
                f"optimizer already has LocalUpdates, and a second one would exchange its changes again: use the first "
                f"one, or make a new {name}"
            )


def named_parameters(optimizers: Sequence[Optimizer], model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the optimizers' parameters by name.

    If every parameter has a name in the optimizers and no two names are equal, these names are used. Otherwise the
    names in the model are used, without the prefixes that DistributedDataParallel and torch.compile add. If a parameter
    has no name in the model either, all parameters are called "parameter 0", "parameter 1" and so on.
    """
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    names = [name for group in groups for name in group.get("param_names", [])]
    parameters = parameters_of(optimizers)
    if len(set(names)) < len(parameters):
        known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
        names = [known.get(id(p), "").replace("_orig_mod.", "").removeprefix("module.") for p in parameters]
    if len({name for name in names if name}) < len(parameters):
        names = [f"parameter {i}" for i in range(len(parameters))]
    return dict(zip(names, parameters, strict=True))


def check_no_others(optimizer: Optimizer, known: Container[int]) -> None:
    """Raise RuntimeError if `optimizer` trains a parameter that is not exchanged, i.e. whose id is not in `known`."""
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            if p.requires_grad and id(p) not in known:
                kind = type(optimizer).__name__
                raise RuntimeError(
                    f"a parameter of shape {shape_and_name(group, j)} in group {i} of {kind} was added or "
                    f"unfrozen after LocalUpdates was made, which would not exchange it: make LocalUpdates while all "
                    f"parameters are trainable, and then freeze (requires_grad_(False)) those to be trained later"
                )


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    if not parameters:
        raise ValueError("optimizer must have parameters that require gradients, and has none")
    parts = {name: local_part(p) for name, p in parameters.items()}
    device = next(iter(parts.values())).device
    for name, part in parts.items():
        if not part.is_floating_point():
            raise ValueError(f"parameters must be floating point, but {name} is {part.dtype}")
        if part.device != device:
            raise ValueError(f"parameters must be on one device, but {name} is on {part.device} and others on {device}")
    check_no_shared_memory(parts, "parameters")


class Shards:
    """Reductions over the processes of one worker. All methods are collective over these processes.

    A worker has several processes if its parameters are DTensors, of which each process has a shard, or if the worker
    is a site, i.e. processes that train one model together. For a site, `within` is the group of all its processes. All
    reductions except `total` then include these processes, even if each has the whole model.
    """

    def __init__(self, parameters: Iterable[Any], within: Group | None = None) -> None:
        # Collect the process groups of the DTensors' meshes, each group once. Their order is that of the parameters,
        # which is identical on all processes, as their collectives require.
        meshes: dict[Any, None] = {p.device_mesh: None for p in parameters if hasattr(p, "device_mesh")}
        sharing = [m.get_group(i) for m in meshes for i in range(m.ndim) if m.size(i) > 1]
        # If `within` and the group of a mesh have the same processes, use `within`, since it may support tensors on
        # more devices than the group of the mesh.
        ranks = getattr(within, "ranks", None)
        self._sharing = [within if within and group.ranks == ranks else group for group in distinct_groups(sharing)]
        self.groups = self._sharing if within is None or within in self._sharing else [*self._sharing, within]

    def __call__(self, bad: Tensor) -> Tensor:
        """Return `bad`, bool[...], reduced with OR over all processes of this worker. An element of the result is True
        if this element of `bad` is True on at least one of these processes."""
        return self.digest(bad.to(torch.int32)) > 0 if self.groups else bad

    def any(self, bad: bool, device: torch.device) -> bool:
        """Return True if `bad` is True on at least one of this worker's processes. `device` is the device of the
        reduced tensor."""
        return bool(self(torch.tensor(bad, device=device))) if self.groups else bad

    def digest(self, numbers: Tensor) -> Tensor:
        """Sum `numbers`, integers, over all processes of this worker, in place, and return them. The sum of the
        fingerprints of all shards is a fingerprint of the whole model."""
        for group in self.groups:
            group.all_reduce(numbers)
        return numbers

    def total(self, values: Tensor) -> Tensor:
        """Sum `values`, in place, over the processes that have shards of this worker's DTensors, and return them."""
        for group in self._sharing:
            group.all_reduce(values)
        return values


def check_covers(parameters: Iterable[Tensor], model: nn.Module) -> None:
    known = {id(p) for p in parameters}
    if missed := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]:
        raise ValueError(
            f"optimizer must have all parameters of model that require gradients, but {_some(missed)} would be trained "
            f"by each worker alone: pass all optimizers, [muon, adamw] say (for a framework that takes one: "
            f"JoinedOptimizer([muon, adamw])), or freeze them (requires_grad_(False))"
        )


class OtherOptimizers:
    """Detects optimizers whose steps `LocalUpdates` does not count, and changes that it does not exchange.

    `parameters` are the exchanged parameters, and `names` the names of the optimizers whose steps are counted. `check`
    raises RuntimeError if an optimizer has stepped on a parameter that is not exchanged, but belongs to the same module
    as exchanged parameters, unless `checks` is False. If an optimizer steps on exchanged parameters twice and no step
    is counted, its second step raises RuntimeError; once a step has been counted, there is a warning instead. With
    `is_alone`, i.e. with one worker, nothing is reported.
    """

    def __init__(self, parameters: Sequence[Tensor], names: str, group: Group, *, checks: bool, is_alone: bool) -> None:
        self._ours, self._names, self._group, self._checks = parameters, names, group, checks
        # No changes are to be exchanged, with one worker or since the last flush. Then other optimizers may train.
        self._is_alone = self._is_over = is_alone
        self._has_counted = self._has_warned = False
        self._in_step = False  # True from the beginning of a step that counts to its end
        # Other optimizers that have stepped since the last counted step
        self._uncounted: WeakSet[Optimizer] = WeakSet()
        # For each optimizer, the ids of the parameters that had gradients in its first step.
        self.stepped: WeakKeyDictionary[Optimizer, set[int]] = WeakKeyDictionary()
        self._has_new = False  # True if an optimizer was recorded since the last `check`
        _watch_steps()
        _watches.add(self)

    def begin(self) -> None:
        """Note that a step which counts begins."""
        self._in_step = True

    def count(self) -> None:
        """Note that a step has been counted."""
        self._has_counted, self._in_step, self._is_over = True, False, self._is_alone
        self._uncounted.clear()

    def flushed(self) -> None:
        """Note that all changes were exchanged."""
        self._is_over = True

    def note(self, optimizer: Optimizer) -> None:
        if optimizer not in self.stepped:
            self.stepped[optimizer] = {id(p) for p in parameters_of([optimizer]) if p.grad is not None}
            self._has_new = True
        if not (self._is_over or self._in_step) and exchange_of(optimizer) is None:
            self._check_counted(optimizer)

    def _check_counted(self, optimizer: Optimizer) -> None:
        """Raise RuntimeError, or warn, if this optimizer has stepped on exchanged parameters since the last counted
        step."""
        is_second = optimizer in self._uncounted
        self._uncounted.add(optimizer)
        if not is_second or self._has_warned or self.stepped[optimizer].isdisjoint(map(id, self._ours)):
            return
        found = (
            f"{type(optimizer).__name__} steps on parameters that LocalUpdates exchanges, and no step of {self._names} "
            f"is counted: pass LocalUpdates the optimizer whose step() is called"
        )
        if not self._has_counted:
            raise RuntimeError(found)
        self._has_warned = True
        warnings.warn(f"{found}, or flush() before another optimizer trains on", stacklevel=6)

    def check(self) -> None:
        """Raise RuntimeError if an optimizer has stepped on parameters of the model that are not exchanged between
        workers. No-op if this object was made with checks=False."""
        if not (self._has_new and self._checks):
            return

        # Find the parameters that are trained by an optimizer of which neither a `LocalUpdates` nor the optimizer
        # itself exchanges the updates.
        alone = {o: ids for o, ids in self.stepped.items() if exchange_of(o) is None}
        ours = {id(p) for p in self._ours}
        theirs = set[int]().union(*alone.values()) - ours
        # Of the parameters that no exchange covers, select those in a module that also has exchanged parameters. If
        # there are several such modules, select the one that has the most parameters without an exchange.
        modules = [dict(module.named_parameters()) for module in recorded_modules()] if theirs else []
        shared = sorted((m for m in modules if not ours.isdisjoint(map(id, m.values()))), key=len, reverse=True)
        missed = [{name: p for name, p in m.items() if id(p) in theirs and p.requires_grad} for m in shared]
        found = max(missed, key=len, default={})
        # The selected parameters differ between workers, unless DDP averages their gradients.
        if found and not is_averaged_by_ddp(found.values(), self._group):
            names = ", ".join(sorted({type(o).__name__ for o in alone}))
            raise RuntimeError(
                f"{names} trains parameters of the model that LocalUpdates does not exchange: {_some(list(found))}. "
                f"They would differ between workers: pass all optimizers, LocalUpdates([muon, adamw]) say"
            )
        self._has_new = False


_watches: WeakSet[OtherOptimizers] = WeakSet()


@cache
def _watch_steps() -> None:
    """Register one hook for all torch optimizers, which calls `OtherOptimizers.note` of each existing `OtherOptimizers`
    after an optimizer's step. Further calls are no-ops.

    The hook is never removed. If it were removed by garbage collection, the removal could happen while torch iterates
    over its hooks.
    """

    def note(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for watch in list(_watches):
            watch.note(optimizer)

    outside: Any = torch.compiler.disable
    register_optimizer_step_post_hook(outside(note))


def stepped_optimizers() -> list[Optimizer]:
    """Return one list of the torch optimizers that have stepped since one of the existing `LocalUpdates` was made.

    It concatenates one list per `LocalUpdates`: the optimizers that have stepped since that object was made, in the
    order of their first steps since then. So an optimizer may occur several times.
    """
    return [o for watch in list(_watches) for found in watch.stepped.keyrefs() if (o := found()) is not None]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
