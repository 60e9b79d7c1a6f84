"""Common parts of the frameworks' callbacks: a hook or local updates attached, measured, kept with a checkpoint."""

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.comm.communicator import Communicator, check_agreement
from packsaddle.comm.group import resolve
from packsaddle.compressors import Compressor
from packsaddle.curvature.certificate import Certificate, Verdict
from packsaddle.feedback.compression import Compression, Schedule
from packsaddle.feedback.state import check_tensor
from packsaddle.hooks.ddp import attach, keep_gradients_local
from packsaddle.hooks.ddp_hook import DDPHook
from packsaddle.local.inner import load_states
from packsaddle.local.start import persistent_buffers
from packsaddle.local.updates import LocalUpdates

NOTHING_TO_DO = "packsaddle has nothing to do: there is one worker, and so no exchange"


class Attached:
    """A framework's callback with the exchange attached to its model; None before training, and with one worker."""

    def __init__(self, compressor: Compressor | Schedule | Compression, options: Mapping[str, Any]) -> None:
        self._compressor, self._options = compressor, options  # of the exchange
        self.exchange: DDPHook | WorkerState | None = None

    @property
    def hook(self) -> DDPHook | None:
        """The hook, once training has begun among workers; None for local updates."""
        return self.exchange if isinstance(self.exchange, DDPHook) else None

    @property
    def local(self) -> LocalUpdates | None:
        """The local updates, once training has begun among workers; None for a hook."""
        return self.exchange.local if isinstance(self.exchange, WorkerState) else None


def attach_among_workers(
    model: nn.Module,
    compressor: Compressor | Schedule | Compression,
    optimizers: list[Optimizer],
    **options: Any,
) -> DDPHook | None:
    """`packsaddle.attach`; or a warning and None where there is one worker, in DistributedDataParallel or not.

    Raises what `register_ddp_hook` raises.
    """
    if resolve(None).size == 1:
        warnings.warn(NOTHING_TO_DO, stacklevel=3)
        return None
    return attach(model, compressor, optimizer=optimizers, **options)


class WorkerState:
    """The state of one worker of local updates; a framework's checkpoint has worker 0's alone.

    That is the state of `local`, of its optimizers and of the GradScaler `scaler`, and the trained parameters and the
    persistent buffers of `model`. To be loaded after the framework has loaded its checkpoint.

    >>> import torch
    >>> import packsaddle
    >>> from packsaddle.integrations import WorkerState
    >>> model = torch.nn.Linear(64, 64)
    >>> local = packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=30)
    >>> WorkerState(local, model).steps
    0
    """

    def __init__(self, local: LocalUpdates, model: nn.Module, scaler: torch.amp.GradScaler | None = None) -> None:
        self.local, self._model, self._scaler = local, model, scaler
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        self.channel = Communicator(resolve(None), local.ledger)

    @property
    def steps(self) -> int:
        """Inner steps so far."""
        return self.local.steps

    def finish(self) -> None:
        """End training with one model on all workers: `local.flush()`, and worker 0's buffers; collective.

        Warns if the flush was not taken.
        """
        if not self.local.flush():
            warnings.warn("parameters are not finite, so workers end with models of their own", stacklevel=3)
        with torch.no_grad():
            for buffer in persistent_buffers(self._model).values():
                self.channel.broadcast(buffer, "buffers")

    def state_dict(self) -> dict[str, Any]:
        """Return it, tensors and plain types; collective during an exchange."""
        return {
            "steps": self.steps,
            "local": self.local.state_dict(),
            "model": self._tensors(),
            "optimizers": [optimizer.state_dict() for optimizer in self.local.optimizers],
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore this worker's `state_dict`, `state`; raises ValueError, changing nothing, if it does not fit."""
        if "local" not in state:
            raise ValueError("the state has no local updates; was it saved by a hook?")
        self.local.check_state_dict(state["local"])
        here = self._tensors()
        for name, tensor in here.items():
            check_tensor(name, state["model"].get(name), tensor.shape, floating=tensor.is_floating_point())
        load_states(self.local.optimizers, state["optimizers"])
        for name, tensor in here.items():
            tensor.copy_(state["model"][name])
        self.local.load_state_dict(state["local"])
        if self._scaler is not None and state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors that training changes, by name; not copies."""
        trained = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        return trained | persistent_buffers(self._model)


def attach_local_updates(
    wrapped: nn.Module,
    model: nn.Module,
    optimizers: list[Optimizer],
    compressor: Compressor | Schedule | Compression,
    **options: Any,
) -> WorkerState | None:
    """Make `LocalUpdates` of a framework's optimizers; or warn and return None where there is one worker.

    `wrapped` is what the framework made of `model`: its DistributedDataParallel exchanges no gradients from here on.
    The contraction is measured in every round; a `Compression` says itself when. Raises TypeError without a
    DistributedDataParallel, and what `LocalUpdates` raises.
    """
    if resolve(None).size == 1:
        warnings.warn(NOTHING_TO_DO, stacklevel=3)
        return None
    if not any(isinstance(module, DistributedDataParallel) for module in wrapped.modules()):
        raise TypeError(
            f"local updates need a framework that wraps the model in DistributedDataParallel, got "
            f"{type(wrapped).__name__}; where it is sharded, make packsaddle.LocalUpdates yourself"
        )
    local = LocalUpdates(optimizers, compressor=monitored(compressor, 1), **{"model": model, **options})
    keep_gradients_local(wrapped)
    return WorkerState(local, model, options.get("scaler"))


def monitored(compressor: Compressor | Schedule | Compression, every: int) -> Compression:
    """Return how to compress, the contraction measured every `every` steps; a `Compression` as it is."""
    return compressor if isinstance(compressor, Compression) else Compression(compressor, monitor_every=every)


def measures(exchange: DDPHook | LocalUpdates | WorkerState | None) -> dict[str, float]:
    """Return the numbers so far of an `exchange`, a hook or local updates, for a logger (docs/metrics.md).

    They are bytes on this worker's wire, steps, contraction: `mu` is there once `monitor_every` has measured it. A hook
    has `sent_in_step`, in bytes, local updates have `rounds`. None, what `attach` returns for one worker, has none.

    >>> import torch
    >>> import packsaddle
    >>> from packsaddle.integrations import measures
    >>> model = torch.nn.Linear(64, 64)
    >>> local = packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=30)
    >>> measures(local)
    {'steps': 0.0, 'skipped': 0.0, 'resets': 0.0, 'sent': 0.0, 'received': 0.0, 'reduction': 1.0, 'rounds': 0.0}
    """
    if exchange is None:
        return {}
    exchange = exchange.local if isinstance(exchange, WorkerState) else exchange
    steps, sent, alone = exchange.steps, exchange.ledger.total.sent, exchange.uncompressed.sent
    found = {
        "steps": float(steps),
        "skipped": float(exchange.skipped),
        "resets": float(len(getattr(exchange, "resets", ()))),  # FSDP hooks have none
        "sent": float(sent),
        "received": float(exchange.ledger.total.received),
        "reduction": alone / sent if sent else 1.0,
    }

    # A hook exchanges in every step, local updates once a round.
    if isinstance(exchange, LocalUpdates):
        found["rounds"] = float(exchange.rounds)
    else:
        found["sent_in_step"] = float(sum(b.sent for b in exchange.ledger.at(steps - 1).values()))
    return found if exchange.contraction is None else found | {"mu": exchange.contraction}


def save_state(exchange: DDPHook | WorkerState | None, folder: str | Path, *, name: str = "packsaddle") -> None:
    """Write this worker's `state_dict()` of a hook or of local updates to its own file in a folder, atomically.

    Every worker calls it, and only an unfinished exchange travels: states differ, are as large as the
    model, and are in place when the run continues. The file is NAME-RANK.pt: several exchanges in one folder, of two
    models, say, need a `name` each. None, what `attach` returns for one worker, has no state.

    >>> import pathlib, tempfile, torch
    >>> import packsaddle
    >>> from packsaddle.integrations import WorkerState, save_state
    >>> model = torch.nn.Linear(64, 64)
    >>> local = packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=30)
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> save_state(WorkerState(local, model), folder)
    >>> [path.name for path in folder.iterdir()]
    ['packsaddle-0.pt']
    """
    if exchange is not None:
        write_whole(_path(folder, name), partial(torch.save, exchange.state_dict()))


def load_state(exchange: DDPHook | WorkerState | None, folder: str | Path, *, name: str = "packsaddle") -> bool:
    """Restore an `exchange` from the files of `save_state` in a `folder`; collective. Return False if there is none.

    `name` is that of `save_state`. Without a file it warns, and all stays as it is. Raises ValueError, with nothing
    changed, if only some workers have a file, if these are of different steps, or if they do not fit (another number of
    workers, another seed, ...).

    >>> import tempfile
    >>> import torch
    >>> import packsaddle
    >>> from packsaddle.integrations import WorkerState, load_state, save_state
    >>> model, folder = torch.nn.Linear(64, 64), tempfile.mkdtemp()
    >>> state = WorkerState(packsaddle.LocalUpdates(torch.optim.AdamW(model.parameters()), every=30), model)
    >>> save_state(state, folder)
    >>> load_state(state, folder)
    True
    """
    if exchange is None:
        return False
    path = _path(folder, name)
    state = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    found = {"steps of the saved state": "no file" if state is None else state["steps"]}
    whose = "hook: its error memory starts at zero"
    if isinstance(exchange, WorkerState):
        whose = "local updates: they start at worker 0's parameters, its optimizer's state and no errors"

    # States of different steps, or of some workers only, must not be mixed.
    try:
        check_agreement(exchange.channel, found, exchange.device)
    except ValueError as error:
        raise ValueError(
            f"{path.parent} has no {name}-RANK.pt of one step for each of {exchange.channel.group.size} workers (were "
            f"there as many when it was saved?). Without these files there is no state of packsaddle's {whose}. {error}"
        ) from error
    if state is None:
        warnings.warn(f"{folder} has no state of packsaddle's {whose}", stacklevel=2)
        return False
    exchange.load_state_dict(state)
    return True


def _path(folder: str | Path, name: str) -> Path:
    """This worker's file; the rank is that among all workers, since an exchange may be among some of them."""
    return Path(folder) / f"{name}-{resolve(None).rank}.pt"


def scalars(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers among some values, those of mappings inside by name/name."""
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found[prefix + name] = float(value)
    return found


def certificate_scalars(certificate: Certificate) -> dict[str, float]:
    """Return a certificate's numbers for a logger, as certificate/grad_norm; certificate/saddle is 0 or 1."""
    found = scalars(certificate.to_dict(), "certificate/")
    return found | {"certificate/saddle": float(certificate.verdict is Verdict.SADDLE)}
