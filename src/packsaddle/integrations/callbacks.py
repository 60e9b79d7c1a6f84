"""The common part of the callbacks for Lightning and Hugging Face: it attaches a DDP hook or local updates, collects
metrics, and saves and restores state."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from packsaddle.checkpoint.parts import check_names, run_on_all
from packsaddle.checkpoint.reshard import resharded
from packsaddle.checkpoint.saves import Found, agreed, find, proposed, saves_in, write_save
from packsaddle.comm.communicator import Communicator, ObjectCollectives
from packsaddle.comm.failures import names_call
from packsaddle.comm.group import resolve, training_group
from packsaddle.curvature.certificate import Certificate, Verdict
from packsaddle.feedback.compression import AnyCompression, Compression
from packsaddle.feedback.optimizers import load_states
from packsaddle.feedback.state import check_tensor
from packsaddle.hooks.ddp import attach, keep_gradients_local, register_ddp_hook
from packsaddle.hooks.ddp_hook import DDPHook
from packsaddle.local.updates import LocalUpdates
from packsaddle.local.watch import persistent_buffers

_SAVES = "packsaddle"  # name of the saves, i.e. of the folder with workers' states in a framework's checkpoint
NOTHING_TO_DO = "packsaddle has nothing to do: there is one worker, and so no exchange"


class Attached:
    """Base class of the callbacks for Lightning and Hugging Face, which attach a DDP hook or local updates. `exchange`
    is the attached object, or None before training. `_makes` is the function or class whose arguments the callback
    accepts: `register_ddp_hook`, or `LocalUpdates` in a subclass. `compressor` and `options` are these arguments.
    Raises TypeError for an option that `_makes` does not accept, or that the framework provides, such as
    `optimizer`."""

    _makes: ClassVar[Any] = staticmethod(register_ddp_hook)

    def __init__(self, compressor: AnyCompression, options: Mapping[str, Any]) -> None:
        known = signature(self._makes).parameters
        if given := [name for name in ("optimizer", "optimizers", "model") if name in options]:
            raise TypeError(
                f"{type(self).__name__} takes {given[0]} from the framework; several optimizers are returned from "
                f"configure_optimizers or, for one that accepts only one, joined in a JoinedOptimizer"
            )
        if unknown := [name for name in options if name not in known]:
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}")
        self._compressor, self._options = compressor, options
        self.exchange: DDPHook | WorkerState | None = None

    @property
    def hook(self) -> DDPHook | None:
        """The DDP hook. It is None before training, with one worker, and if local updates are used instead of a
        hook."""
        return self.exchange if isinstance(self.exchange, DDPHook) else None

    @property
    def local(self) -> LocalUpdates | None:
        """The `LocalUpdates` object. It is None before training, and if a hook is used instead of local updates."""
        return self.exchange.local if isinstance(self.exchange, WorkerState) else None

    def _make(
        self, wrapped: nn.Module, model: nn.Module, optimizers: list[Optimizer], scaler: Any, log_every: int
    ) -> "DDPHook | WorkerState | None":
        """Attach local updates if `_makes` is `LocalUpdates`, and otherwise a hook. Return the attached object.

        `wrapped` is the framework's wrapper of the user's model, `model`. `scaler` is the framework's GradScaler or
        None. A hook measures the contraction, the fraction of the squared norm that compression keeps, every
        `log_every` steps. With one worker no hook is attached: the method warns and returns None. Raises the exceptions
        of `attach` or `attach_local_updates`, and RuntimeError if a launcher started several processes but there is no
        process group.
        """
        options = {"scaler": scaler, **self._options}
        if self._makes is LocalUpdates:
            return attach_local_updates(wrapped, model, optimizers, self._compressor, **options)
        if training_group(None).size == 1:
            warnings.warn(NOTHING_TO_DO, stacklevel=2)
            return None
        return attach(wrapped, monitored(self._compressor, log_every), optimizer=optimizers, **options)


class WorkerState:
    """The state of one worker that trains with `LocalUpdates`. A framework's own checkpoint contains only the state of
    worker 0, while parameters and optimizer states differ between workers.

    The state consists of the states of `local`, a `LocalUpdates`, of its optimizers and of the GradScaler `scaler` (if
    it is not None), and of the trained parameters and persistent buffers of `model`. Save it on every worker, and load
    it after the framework has loaded its own checkpoint.
    """

    def __init__(self, local: LocalUpdates, model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
        # Use the user's model if the framework has wrapped it in DistributedDataParallel.
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self.local, self._model, self._scaler = local, model, scaler
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        self.channel = Communicator(resolve(None), local.ledger)

    @property
    def steps(self) -> int:
        """The number of inner steps of this worker, i.e. steps of its optimizers."""
        return self.local.steps

    def finish(self) -> None:
        """Make the model identical on all workers at the end of training: exchange all pending updates (see
        `LocalUpdates.flush`), then broadcast worker 0's buffers; collective. Warns if the exchange was rejected, in
        which case the workers' parameters still differ."""
        if not self.local.flush():
            warnings.warn("parameters are not finite, so workers end with models of their own", stacklevel=3)
        with torch.no_grad():
            for buffer in persistent_buffers(self._model).values():
                self.channel.broadcast(buffer, "buffers")

    @property
    def parts(self) -> dict[str, Any]:
        """The objects whose states differ between workers (the model, the local updates and the optimizers), as a dict
        by name, which `save_checkpoint` accepts."""
        optimizers = {f"optimizer-{i}": optimizer for i, optimizer in enumerate(self.local.optimizers)}
        return {"model": self._model, "local": self.local, **optimizers}

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's state as tensors and plain types; collective if an exchange is in progress."""
        parts = {name: part.state_dict() for name, part in self.parts.items() if name != "model"}
        return {
            "steps": self.steps,
            "parts": {"model": self._tensors(), **parts},
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state`, a result of `state_dict`. Raises ValueError, with nothing changed, if the state does not fit
        the model, the optimizers or the options of this run."""
        if "local" not in state.get("parts", ()):
            raise ValueError("the state has no local updates; was it saved by a hook?")
        saved, here = state["parts"], self._tensors()
        self.local.check_state_dict(saved["local"])
        for name, tensor in here.items():
            check_tensor(name, saved["model"].get(name), tensor.shape, floating=tensor.is_floating_point())
        load_states(self.local.optimizers, [s for name, s in saved.items() if name.startswith("optimizer-")])
        for name, tensor in here.items():
            tensor.copy_(saved["model"][name])
        self.local.load_state_dict(saved["local"])
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _tensors(self) -> dict[str, Tensor]:
        trained = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        return trained | persistent_buffers(self._model)


def attach_local_updates(
    wrapped: nn.Module,
    model: nn.Module,
    optimizers: list[Optimizer],
    compressor: AnyCompression,
    **options: Any,
) -> WorkerState:
    """Make a `LocalUpdates` for a framework's `optimizers` with the given `compressor`, and disable the exchange of
    gradients by the framework's DistributedDataParallel.

    `model` is the user's model, and `wrapped` is the framework's wrapper of it, which contains the
    DistributedDataParallel. `options` are further arguments of `LocalUpdates`. The contraction, the fraction of the
    squared norm that compression keeps, is measured in every round, unless `compressor` is a `Compression`, which sets
    the interval itself. With one worker the function warns that nothing is sent. Returns the `WorkerState` of the new
    `LocalUpdates`.

    Raises TypeError if there are several workers and `wrapped` contains no DistributedDataParallel. Raises ValueError
    for `Workers(weight="steps")`, since the framework's own collectives need equal numbers of steps. Also raises the
    exceptions of `LocalUpdates`.
    """
    if resolve(None).size == 1:
        warnings.warn("there is one worker, so its LocalUpdates send nothing", stacklevel=3)
    elif not any(isinstance(module, DistributedDataParallel) for module in wrapped.modules()):
        raise TypeError(
            f"local updates need a framework that wraps the model in DistributedDataParallel, got "
            f"{type(wrapped).__name__}; where it is sharded, make packsaddle.LocalUpdates yourself"
        )
    if getattr(options.get("workers"), "weight", None) == "steps":
        raise ValueError(
            'weight must not be "steps" in a framework whose own collectives need equal steps of all workers'
        )
    local = LocalUpdates(optimizers, compressor=monitored(compressor, 1), **{"model": model, **options})
    keep_gradients_local(wrapped)
    return WorkerState(local, model, options.get("scaler"))


def monitored(compressor: AnyCompression, every: int) -> Compression:
    """Return a `Compression` with the compressor `compressor`, whose contraction is measured every `every` steps. The
    contraction is the fraction of the squared norm that compression keeps. If `compressor` is already a `Compression`,
    it is returned unchanged."""
    return compressor if isinstance(compressor, Compression) else Compression(compressor, monitor_every=every)


def measures(exchange: DDPHook | LocalUpdates | WorkerState | None) -> dict[str, float]:
    """Return the metrics of `exchange`, a DDP hook or local updates, as a dict for a logger (docs/integrations.md).

    `steps` is the number of steps of this worker. `skipped` is the number of skipped steps or, for local updates, of
    rejected rounds. `sent` and `received` are the numbers of bytes that this worker has sent and received so far.
    `reduction` is the number of bytes that an uncompressed exchange of the gradients in each step would have sent,
    divided by `sent`. `mu` is the contraction, i.e. the fraction of the squared norm that compression kept at the last
    measurement. The dict has no `mu` before the first measurement (see `Compression.monitor_every`).

    For a hook, `sent_in_step` is the number of bytes sent in the last step. For local updates, `rounds` is the number
    of applied exchanges, and `resets` is the number of times that the escape check fired. If `Workers.clip` is set,
    `clipped` is the number of clipped updates. With `Workers(weight="steps")`, `pace` is the number of inner steps of
    worker 0 in a round.

    Returns {} if `exchange` is None, which is the result of `attach` with one worker.
    """
    if exchange is None:
        return {}
    exchange = exchange.local if isinstance(exchange, WorkerState) else exchange
    steps, sent, alone = exchange.steps, exchange.ledger.sent, exchange.uncompressed.sent
    found = {
        "steps": float(steps),
        "skipped": float(exchange.skipped),
        "sent": float(sent),
        "received": float(exchange.ledger.received),
        "reduction": alone / sent if sent else 1.0,
    }

    # Add the metrics that only local updates have, or those that only a hook has.
    if isinstance(exchange, LocalUpdates):
        found |= {"rounds": float(exchange.rounds), "resets": float(len(exchange.resets))}
        if exchange.options.workers.clip is not None:
            found["clipped"] = float(exchange.clipped)
        if exchange.options.workers.weight == "steps":
            found["pace"] = float(exchange.paces[0])
    else:
        found["sent_in_step"] = float(sum(b.sent for b in exchange.ledger.at(steps - 1).values()))
    return found if exchange.contraction is None else found | {"mu": exchange.contraction}


@names_call("save_state")
def save_state(exchange: DDPHook | WorkerState | None, folder: str | Path) -> None:
    """Save the state of `exchange`, a hook or local updates, to the folder `folder`/packsaddle; collective.

    Each worker writes a file of its own, since states differ between workers, and each state is as large as the model.
    A state that `folder` has already is not overwritten: the new one is saved to packsaddle-2, and so on. The earlier
    one is removed after all workers have written theirs, so whenever processes are killed, `load_state` finds files
    that are all of one call. If there are several hooks or local updates, such as those of two models, save each to a
    folder of its own. No-op if `exchange` is None, which is the result of `attach` with one worker.

    Raises CheckpointError on every worker, with an earlier state unchanged, if a worker cannot write its files. With
    local updates, raises RuntimeError if the workers' calls differ, for example because only rank 0 saves.
    """
    if exchange is None:
        return
    (exchange.local if isinstance(exchange, WorkerState) else exchange).check_call("saves a checkpoint")
    collectives = ObjectCollectives(exchange.channel.group, exchange.device)
    proposal = run_on_all(collectives, partial(proposed, Path(folder), _SAVES))
    save, identity = agreed(Path(folder), _SAVES, collectives.gather(proposal))
    write_save(save, identity, exchange.state_dict(), collectives, step=exchange.steps, shapes={})


@names_call("load_state")
def load_state(exchange: DDPHook | WorkerState | None, folder: str | Path) -> bool:
    """Restore `exchange`, a hook or local updates, from the files that `save_state` wrote in `folder`; collective.

    Returns True if `exchange` was restored. Returns False, with a warning and nothing changed, if no worker has a file.
    If `exchange` is None, which is the result of `attach` with one worker, the function returns False, and warns if
    there are files. If the last call of `save_state` was interrupted, the state of the call before it is loaded, with a
    warning.

    If the files were saved by a run with another number of workers, a warning is issued. Tensors that differed between
    workers in that run, such as error memories, are then set to their mean (see `load_checkpoint`). Raises ValueError,
    with nothing changed, in three cases: there are files, but not those of all workers in one call of `save_state`, a
    file is damaged, or a file does not fit `exchange`, for example because it was saved with another seed.
    """
    folder = Path(folder)
    if exchange is None:
        if saves_in(folder, _SAVES):
            warnings.warn(
                f"{folder} has error memories of several workers, which one worker does not use", stacklevel=2
            )
        return False
    whose = "hook: its error memory starts at zero"
    if isinstance(exchange, WorkerState):
        whose = "local updates: they start at worker 0's parameters, its optimizer's state and no errors"

    # Find the last state of which all files are there.
    collectives = ObjectCollectives(exchange.channel.group, exchange.device)
    found = find(folder, _SAVES, collectives)
    problems = "; ".join(f"{save.path}: {problem}" for save, problem in found.problems.items())
    if found.save is None:
        if any(collectives.gather(bool(list(folder.glob("packsaddle-*.pt"))))):
            problems = f"{folder} has packsaddle-RANK.pt of an earlier version of packsaddle; use that version"
        if problems:
            raise ValueError(f"{problems}. Without these files there is no state of packsaddle's {whose}")
        warnings.warn(f"{folder} has no state of packsaddle's {whose}", stacklevel=2)
        return False

    # If the number of workers has changed since the files were saved, convert the states to the current number.
    workers, size = len(found.holders), collectives.group.size
    state = found.own(collectives) if workers == size else _resharded(exchange, found, collectives)
    exchange.load_state_dict(state)
    if collectives.group.rank == 0 and problems:
        warnings.warn(f"an earlier state is loaded than the last one, which is incomplete: {problems}", stacklevel=2)
    if collectives.group.rank == 0 and workers != size:
        warnings.warn(
            f"the state in {folder} was saved by {workers} worker{'s' * (workers > 1)} and is loaded by {size}: each "
            f"has the means of what differed between them, such as error memories",
            stacklevel=2,
        )
    return True


def _resharded(exchange: DDPHook | WorkerState, found: Found, collectives: ObjectCollectives) -> dict[str, Any]:
    """Return the state of this worker, converted from the files of another number of workers; collective. Raises
    ValueError on every worker if the files cannot be converted."""
    # Convert the parts of the state. The scaler's state is copied from worker 0.
    parts = exchange.parts if isinstance(exchange, WorkerState) else {"hook": exchange}
    first = found.of_rank(0, collectives)
    template, *mine = [state.get("parts", {"hook": state}) for state in (first, *found.contents.values())]
    check_names(parts, template)
    converted = resharded(parts, template, mine, len(found.holders), collectives)
    return {**first, "parts": converted} if isinstance(exchange, WorkerState) else converted["hook"]


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers in a mapping, as floats, by name. A number in a nested mapping has the name OUTER/INNER, with
    the names in both mappings. `prefix` is put before each name. Values that are not numbers, such as bools, are
    omitted."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def certificate_scalars(certificate: Certificate) -> dict[str, float]:
    """Return the numbers of a certificate as a dict for a logger, with keys such as certificate/grad_norm. Each
    possible verdict on the model, such as "saddle", has a key such as certificate/saddle, whose value is 1 if it is the
    certificate's verdict and 0 otherwise."""
    verdicts = {f"certificate/{one.name.lower()}": float(one is certificate.verdict) for one in Verdict}
    return scalars(certificate.to_dict(), "certificate/") | verdicts


def certificate_line(certificate: Certificate, step: int) -> str:
    low, high = certificate.lambda_min_lower, certificate.lambda_min_upper
    bounds = f"lambda_min in [{low:.3e}, {high:.3e}]"
    if math.isinf(low):
        bounds = "no bound on lambda_min" if math.isinf(high) else f"lambda_min at most {high:.3e}"
    limit = "" if certificate.epsilon is None else f" (epsilon {certificate.epsilon:.3e})"
    norm = f"{certificate.grad_norm:.3e}{limit}"
    return f"step {step}: {certificate.verdict}, gradient norm {norm}, {bounds}"
