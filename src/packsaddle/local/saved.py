"""What a run of local updates saves and what identifies it: the fields of the saved state, rules for loading it if the
number of workers has changed, and the arguments that must be equal on all workers."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import ring_all_reduce
from packsaddle.comm.ledger import Bytes, Ledger, Totals
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import Compressor, describe
from packsaddle.feedback.optimizers import with_members
from packsaddle.feedback.state import ANY, Rule, State, Value, Vector, attribute
from packsaddle.local.after import Reactions
from packsaddle.local.anchor import OuterOptimizer
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import LocalOptions, Workers
from packsaddle.local.schedule import Schedule
from packsaddle.local.workers import WorkerSet
from packsaddle.numerics.kernels import arithmetic
from packsaddle.options.agreement import agreement

# The arguments of LocalUpdates that may differ between the run that saves a state and the run that loads it. All other
# arguments are in the identity of the state (see `saved_state`), so that loading it raises ValueError if they differ.
FREE_ARGUMENTS = frozenset(
    {"compressor", "mean_momentum", "workers", "noise", "offload", "scaler", "model", "warn_own_state"}
)


class Baseline:
    """The bytes that a process would have sent if the gradients of `parameters` were exchanged by a ring all-reduce in
    each step. If a worker has several `processes`, each of them is counted with an equal part of the gradients."""

    def __init__(self, parameters: Iterable[Tensor], processes: int) -> None:
        self._size = sum(local_part(p).nbytes for p in parameters) // processes
        self._with_others = Bytes()  # saved bytes minus those that `bytes` computes for the same steps; 0 by default

    def bytes(self, steps: int, workers: int) -> Bytes:
        return self._with_others + ring_all_reduce(steps * self._size, workers)

    def load(self, saved: Bytes, steps: int, workers: int) -> None:
        """Restore the `saved` bytes of the first `steps` steps. The number of workers in these steps may have been
        different from `workers`, the current number."""
        self._with_others = Bytes()
        self._with_others = saved - self.bytes(steps, workers)


def _rules(*, by_steps: bool) -> list[Rule]:
    """Return the rules of the saved state of local updates. A rule says if an entry is identical on all workers and, if
    it is not, how the entries of all workers are converted to another number of workers.

    `by_steps` is True if workers may make different numbers of steps, so that the entry "steps" differs between
    workers.
    """
    part = ("fragments", ANY)
    error = (*part, "error", ANY)
    return [
        Rule(error, "error"),
        Rule((*part, "owed", ANY), "error", like=error),
        Rule((*part, "shift", ANY), "error", like=error),
        Rule((*part, "exchange", "start", ANY), "error"),
        # With another number of workers this flag becomes False, since the next round checks the parameters again.
        Rule((*part, "exchange", "invalid"), "constant", value=False),
        *(Rule((*part, name), "own") for name in ("shift", "owed", "aggregator")),
        *(Rule((*part, name), "own") for name in ("contraction", "trained")),
        # The error memories are converted to the workers' current parts of the mean first (`in_current_parts`).
        Rule((*part, "made"), "constant", value=None),
        *(Rule((*part, name), "shared") for name in ("rounds", "rejected", "anchor", "exchange")),
        *(Rule(("identity", name), "constant") for name in ("rank", "workers")),
        *(Rule((name,), "own") for name in ("skips", "ledger", "uncompressed", "share", "membership", "clipped")),
        *(Rule((name,), "own") for name in ("pacing", "schedule")),
        Rule(("steps",), "own" if by_steps else "shared"),
        *(Rule((name,), "shared") for name in ("format", "identity", "outer", "escape")),
        Rule(("resets",), "shared"),
    ]


class Counted(Protocol):
    """An object that counts this worker's inner steps, i.e. a `LocalUpdates`."""

    steps: int


def saved_state(
    local: Counted,
    options: LocalOptions,
    names: Iterable[str],
    fragments: Sequence[Fragment],
    workers: WorkerSet,
    outer: OuterOptimizer | None,
    reactions: Reactions,
    baseline: Baseline,
) -> State:
    """Return the description of the saved state of `local`, a `LocalUpdates`: its fields, how each is read and loaded,
    and rules for loading with another number of workers. `names` are the names of the parameters."""
    ledger: Ledger = workers.channel.ledger

    def identity() -> dict[str, Any]:
        same: dict[str, Any] = {"seed": options.seed, "keep_unsent": options.keep_unsent}
        same |= {"outer": outer is not None, "escape": options.escape is not None}
        same["parameters"] = "by number" if any(n.startswith("parameter ") for n in names) else "by name"
        return same | workers.identity()

    def uncompressed() -> Bytes:
        return baseline.bytes(local.steps, workers.channel.group.size)

    def load_uncompressed(saved: Bytes) -> None:
        baseline.load(saved, local.steps, workers.channel.group.size)

    def fields() -> list[Vector | Value]:
        return [
            *([] if outer is None else [outer.field()]),
            attribute(("steps",), local, "steps", int),
            *(field for i, part in enumerate(fragments) for field in part.fields(("fragments", i))),
            *reactions.fields(),
            Value(("ledger",), Totals, ledger.state_dict, ledger.load_state_dict),
            Value(("uncompressed",), Bytes, uncompressed, load_uncompressed),
            *workers.fields(),
        ]

    rules = _rules(by_steps=options.workers.weight == "steps")
    return State("LocalUpdates", rules, identity, fields)


def in_current_parts(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return one worker's saved state in which the error memories count as much in the mean with the worker's current
    weight as they do with the weight with which they were made (see `Fragment.carried`). `state` does not change.

    The point at which the worker continued after the last exchange, from which its local update is measured, stays.
    With `keep_unsent` this is the anchor minus the error memory, plus a `shift`.
    """
    identity, found = state.get("identity", {}), []
    for part in state["fragments"]:
        made, now = part.get("made"), state.get("share", 1.0) / identity.get("workers", 1)
        factor = 1.0 if made is None or "workers" not in identity else made / now
        if factor != 1.0:
            error = {name: factor * e for name, e in part["error"].items()}
            part = {**part, "error": error}
            if identity["keep_unsent"]:
                shift = part["shift"] or {name: torch.zeros_like(e) for name, e in error.items()}
                part["shift"] = {name: shift[name] + (e - e / factor) for name, e in error.items()}
        found.append(part)
    return {**state, "fragments": found}


# The arguments that must be equal on all workers.


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
    same |= agreement(options) | {"every": Schedule(options.every).periods(), "arithmetic": arithmetic(device)}
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
