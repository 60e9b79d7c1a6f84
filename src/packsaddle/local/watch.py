"""Checks of the training script, which detect mistakes that raise no other error.

Before training: which parameters are exchanged, and whether another optimizer trains others. After the first step:
whether workers have started at different parameters, whose mean is meaningless, and whether something else, such as
DistributedDataParallel, exchanges the gradients, which costs all the bytes that local updates save. During training:
optimizers whose changes are not exchanged, and state dicts of one worker alone. At the end: steps that were not
exchanged.
"""

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from packsaddle.checkpoint.own_state import is_own_state
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import Group
from packsaddle.comm.modules import is_averaged_by_ddp, recorded_modules
from packsaddle.comm.sharding import local_part
from packsaddle.feedback.checks import fingerprint
from packsaddle.feedback.exchanging import Exchanging, exchange_of, has_hook
from packsaddle.feedback.optimizers import parameters_of, shape_and_name, with_members
from packsaddle.feedback.slices import check_no_shared_memory
from packsaddle.local.anchor import Trained
from packsaddle.numerics.devices import widened

T = TypeVar("T")
_log = logging.getLogger("packsaddle")
_PROOF = 16  # gradients with fewer different values may be equal on all workers by chance


def names_of(optimizers: Iterable[Optimizer]) -> str:
    return " + ".join(type(optimizer).__name__ for optimizer in optimizers)


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


def exchanged_in(optimizer: Optimizer, trained: Mapping[int, Trained]) -> list[Trained]:
    """Return the optimizer's parameters that are exchanged. `trained` has all exchanged parameters, by id. Raises
    RuntimeError if the optimizer trains a parameter that is not exchanged, or if an exchanged parameter was converted
    to another dtype or moved to another device."""
    found = []
    for i, group in enumerate(optimizer.param_groups):
        for j, p in enumerate(group["params"]):
            each = trained.get(id(p))
            if each is not None:
                found.append(each)
                if p.dtype != each.dtype or p.device != each.device:
                    raise RuntimeError(
                        f"the parameter of shape {shape_and_name(group, j)} in group {i} of {type(optimizer).__name__} "
                        f"was {each.dtype} on {each.device} when LocalUpdates was made, and is {p.dtype} on {p.device} "
                        f"now: convert or move the model before LocalUpdates is made"
                    )
            elif p.requires_grad:
                kind = type(optimizer).__name__
                raise RuntimeError(
                    f"a parameter of shape {shape_and_name(group, j)} in group {i} of {kind} was added or "
                    f"unfrozen after LocalUpdates was made, which would not exchange it: make LocalUpdates while all "
                    f"parameters are trainable, and then freeze (requires_grad_(False)) those to be trained later"
                )
    return found


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

    `parameters` are the exchanged parameters, and `optimizers` the optimizers whose steps are counted. `check`
    raises RuntimeError if an optimizer has stepped on a parameter that is not exchanged, but belongs to the same module
    as exchanged parameters, unless `checks` is False. If an optimizer steps on exchanged parameters twice and no step
    is counted, its second step raises RuntimeError; once a step has been counted, there is a warning instead. With
    `is_alone`, i.e. with one worker, nothing is reported.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        optimizers: Sequence[Optimizer],
        group: Group,
        *,
        checks: bool,
        is_alone: bool,
    ) -> None:
        self._ours, self._counted, self._group, self._checks = list(parameters), optimizers, group, checks
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
        is_counted = self._is_over or self._in_step or optimizer in self._counted
        if not is_counted and exchange_of(optimizer) is None:
            self._check_counted(optimizer)

    def _check_counted(self, optimizer: Optimizer) -> None:
        """Raise RuntimeError, or warn, if this optimizer has stepped on exchanged parameters since the last counted
        step."""
        is_second = optimizer in self._uncounted
        self._uncounted.add(optimizer)
        if not is_second or self._has_warned or self.stepped[optimizer].isdisjoint(map(id, self._ours)):
            return
        found = (
            f"{type(optimizer).__name__} steps on parameters that LocalUpdates exchanges, and no step of "
            f"{names_of(self._counted)} "
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


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's persistent buffers, i.e. those in its `state_dict`, by name. Other buffers, such as caches, are
    omitted, since their shapes may differ between workers."""
    passing = {
        f"{prefix}.{name}".lstrip(".")
        for prefix, module in model.named_modules()
        for name in module._non_persistent_buffers_set
    }
    return {name: b.detach() for name, b in model.named_buffers() if name not in passing}


def untrained_tensors(parameters: Mapping[str, Tensor], model: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Return the tensors that are not trained, as pairs (name, tensor). They are the frozen parameters among
    `parameters`, the parameters of the optimizers by name, and the frozen parameters and persistent buffers of `model`,
    if it is not None."""
    named = list(parameters.items())
    if model is not None:
        known = {id(p) for _, p in named}
        named += [(name, p) for name, p in model.named_parameters() if id(p) not in known]
        named += persistent_buffers(model).items()
    return [(name, t) for name, t in named if not t.requires_grad]


def check_first_step(
    channel: Communicator,
    anchors: Sequence[Tensor],
    parameters: Iterable[Tensor],
    do: Callable[[Callable[[], object]], None],
    digest: Callable[[Tensor], Tensor],
    hint: str = "load weights on all workers, or before LocalUpdates is made",
) -> None:
    """Check after the first step that workers started at the same parameters, and that nothing else exchanges
    gradients.

    Collective with several workers, and a no-op with one worker. `anchors` has the values of the parameters at which
    this worker started, one vector for each fragment (part of the model). `parameters` have the gradients of this
    worker's first step. `do` runs the collective that is passed to it as a function, and `digest` sums integers over
    the processes of a worker. Raises RuntimeError if anchors differ, with `hint` as the advice, or if gradients are
    bitwise identical on all workers. Gradients with fewer than 16 different values, not counting 0, Inf and NaN, may be
    equal by chance: rank 0 then warns instead.
    """
    if channel.group.size == 1:
        return
    # Gather a fingerprint of the parameters at which each worker started, and one of its gradients.
    parameters = list(parameters)
    gradients: list[Any] = [local_part(p.grad) for p in parameters if p.grad is not None]
    gradients = [g if g.layout == torch.strided else g.to_dense() for g in gradients]
    start = torch.stack([fingerprint(anchor) for anchor in anchors]).sum().cpu()
    whole = torch.stack([fingerprint(g) for g in gradients]).sum().cpu() if gradients else start.new_zeros(())
    gathered: list[Any] = []
    mine = {"prints": digest(torch.stack([start, whole]).to(anchors[0].device))}
    do(lambda: gathered.extend(channel.gather(mine, fixed_size=True, purpose="start")))
    prints = [parts["prints"].tolist() for parts in gathered]
    others = [worker for worker, (anchor, _) in enumerate(prints) if anchor != prints[0][0]]
    if others:
        raise RuntimeError(
            f"workers must begin at the same parameters, but worker {others[0]} differs from worker 0: {hint}"
        )
    if any(grad != prints[0][1] for _, grad in prints):
        return
    # Gradients that are 0, or that have few different values, may be equal on all workers without an exchange.
    nonzero: list[Any] = [widened(g[g.isfinite() & (g != 0)]) for g in gradients]
    together: Any = torch.cat([values.unique() for values in nonzero]) if nonzero else torch.empty(0)
    values = int(digest(torch.tensor([len(together.unique())], device=anchors[0].device)))
    if not values:
        return
    found = f"gradients are equal bit for bit on all {len(prints)} workers at the first step"
    if has_hook(parameters):
        raise RuntimeError(
            f"{found}, since a hook of packsaddle exchanges them (register_ddp_hook), and LocalUpdates would exchange "
            f"the same changes again: use either the hook or LocalUpdates"
        )
    found += (
        ": either they are exchanged as well (by DistributedDataParallel, say; see packsaddle.keep_gradients_local), "
        "or all workers have the same batch: give each its own, by a DistributedSampler or as data[rank::workers]"
    )
    if values >= _PROOF:
        raise RuntimeError(found)
    if channel.group.rank == 0:
        warnings.warn(f"{found}. It may be chance: they have few different values, {values}", stacklevel=2)


class StateDictWarning:
    """A hook of a model that warns once if `model.state_dict()` is called while this worker's parameters differ from
    the anchor, on which all workers last agreed. A script that saves this state dict on rank 0 would save the model of
    one worker.

    `owner` is the `LocalUpdates` of the model. The hook is removed when `owner` is garbage-collected, or by
    `remove_from` when the model gets another `LocalUpdates`. `differs(owner)` returns True if the parameters differ
    from the anchor. The hook does not warn within the context `own_state`, in which packsaddle's checkpoints read each
    worker's parameters. A copy of the model has a no-op in place of the hook.
    """

    def __init__(self, model: nn.Module, owner: T, differs: Callable[[T], bool]) -> None:
        self._differs, self._owner, self._has_warned = differs, weakref.ref(owner), False
        self._hook = model.register_state_dict_pre_hook(self)  # type: ignore[no-untyped-call]
        weakref.finalize(owner, self._hook.remove)

    @staticmethod
    def remove_from(model: nn.Module) -> None:
        """Remove the hook of an earlier `LocalUpdates` of the model, whose anchor is out of date. The earlier one may
        still exist: it is in a reference cycle with the hooks of its optimizers."""
        for hook in list(model._state_dict_pre_hooks.values()):
            if isinstance(hook, StateDictWarning):
                hook._hook.remove()

    def __call__(self, *_: object) -> None:
        owner = self._owner()
        if owner is None or self._has_warned or is_own_state() or not self._differs(owner):
            return
        self._has_warned = True
        warnings.warn(
            "model.state_dict() between rounds has this worker's own parameters: for one model of all workers call "
            "local.state_dict_of(model), local.at_anchor() or local.flush(). If each worker saves its own, as a run "
            "that resumes needs, set LocalUpdates(warn_own_state=False)",
            stacklevel=3,
        )

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return partial, (_no_op,)


def _no_op(*_: object) -> None:
    """No-op: a copy of the model has this function in place of the hook that warns (`StateDictWarning`), since the copy
    belongs to no `LocalUpdates`."""


class UnsentSteps:
    """Logs a warning if training ends while the local update of this worker's last steps was not sent to the other
    workers.

    The training ends when `owner` is garbage-collected or the interpreter exits. The warning is logged if there were
    steps since the last `flush`, checkpoint or use of the anchor (the parameters on which all workers last agreed), and
    `is_left()` returns True, i.e. this worker's parameters differ from the anchor. No-op if `owner` is None, or if an
    exception ends the script.
    """

    def __init__(self, owner: object | None, is_left: Callable[[], bool]) -> None:
        self._steps = self._exchanged = 0
        self._is_pending, self._is_left = False, is_left
        if owner is not None:
            weakref.finalize(owner, self._warn)  # also calls `_warn` at interpreter exit

    def record(self, steps: int, *, exchanged: bool) -> None:
        """Record that this worker has made inner step number `steps`. `exchanged` is True if a round followed it."""
        self._steps, self._is_pending = steps, True
        self._exchanged = steps if exchanged else self._exchanged

    def clear(self) -> None:
        """Cancel the warning about the inner steps made so far whose changes were not sent. Call when all workers have
        the same model, or when the anchor (the parameters last agreed on) is read or saved."""
        self._is_pending = False

    def _warn(self) -> None:
        if self._is_pending and sys.exc_info()[0] is None and not hasattr(sys, "last_type") and self._is_left():
            _log.warning(
                "LocalUpdates ended without flush() after %d steps, %d of them since its last round, so the workers' "
                "models differ: call local.flush() after the last step, or save local.state_dict_of(model)",
                *(self._steps, self._steps - self._exchanged),
            )


@dataclass(frozen=True)
class Watches:
    """The objects that detect mistakes in a training script. `others` detects optimizers whose parameters are not
    exchanged, and `unsent` detects steps that are not exchanged when the training ends."""

    others: OtherOptimizers
    unsent: UnsentSteps

    def begin(self, optimizer: Optimizer, trained: Mapping[int, Trained]) -> list[Trained]:
        """Note that a step of `optimizer` begins, and return its parameters that are exchanged (see
        `exchanged_in`)."""
        found = exchanged_in(optimizer, trained)
        self.others.begin()
        return found

    def count(self) -> None:
        """Note that a step has been counted, before the rounds that follow it. Raises RuntimeError if another optimizer
        has trained parameters that are not exchanged."""
        self.others.check()
        self.others.count()
        # Cancel the warning about a missing `flush` before the rounds: if a collective of a round fails, `flush` would
        # fail too.
        self.unsent.clear()
