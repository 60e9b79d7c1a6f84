"""The start and the end of local training: equal parameters at the start, a check after the first step, and a warning
at the end if the last steps were not exchanged.

The check after the first step detects two faults that raise no other error. One is that workers start at different
parameters, whose mean is meaningless. The other is that something else, such as DistributedDataParallel, exchanges the
gradients, which costs all the bytes that local updates save.
"""

import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from packsaddle.checkpoint.own_state import is_own_state
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import local_part
from packsaddle.feedback.checks import fingerprint
from packsaddle.feedback.exchanging import has_hook
from packsaddle.local.inner import OtherOptimizers
from packsaddle.numerics.devices import widened

T = TypeVar("T")
_log = logging.getLogger("packsaddle")
_PROOF = 16  # gradients with fewer different values may be equal on all workers by chance


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


@torch.no_grad()
def share_start(channel: Communicator, tensors: Sequence[Tensor], device: torch.device) -> None:
    """Set tensors to rank 0's values, in place; collective. Fingerprints of 8 bytes per tensor are gathered first, as
    tensors on `device`, and only the tensors whose fingerprints differ between workers are broadcast."""
    if channel.group.size == 1:
        return
    parts = [local_part(p) for p in tensors]
    prints = torch.stack([fingerprint(part).cpu() for part in parts]).to(device)
    gathered = [p["prints"] for p in channel.gather({"prints": prints}, fixed_size=True, purpose="start")]
    differs = torch.stack([row != gathered[0] for row in gathered]).any(0).tolist()
    for part, differ in zip(parts, differs, strict=True):
        if differ:
            channel.broadcast(part, "start")


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
