"""Groups of workers. This is the only module that imports torch.distributed.

A group has four collectives. `Solo` is the group of one, `TorchGroup` a torch.distributed process group (gloo
or NCCL); `packsaddle.simulate` adds a group of threads. What to send is `average`'s part, counting bytes `channel`'s.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from packsaddle.missing import PeerLostError, explanation, is_network, roll_call
from packsaddle.schema import ConfigError
from packsaddle.wording import shown

ProcessGroup = dist.ProcessGroup
_NO_TAG = 7_654_321  # of messages that nobody sends


class Group(ABC):
    """Workers that call the same collectives in the same order. `rank` is this worker, `size` their number W."""

    rank: int
    size: int

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the tensor by its sum over workers, in place; equal shapes and dtypes everywhere."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor, by rank; equal shapes and dtypes everywhere."""

    @abstractmethod
    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send outgoing[r], flat, to worker r, and return what each sent here, by rank; sizes[r] elements from r."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> None:
        """Replace the tensor by rank 0's, in place."""


class Solo(Group):
    """One worker, nothing to exchange."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> None:
        pass

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor]

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return [outgoing[0]]

    def broadcast(self, tensor: Tensor) -> None:
        pass


class TorchGroup(Group):
    """A torch.distributed process group (None: the default one)."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    def all_reduce(self, tensor: Tensor) -> None:
        with self.told():
            dist.all_reduce(tensor, group=self._group)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.told():
            dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        received = outgoing[0].new_empty(sum(sizes))
        with self.told():
            dist.all_to_all_single(
                received, torch.cat(list(outgoing)), list(sizes), [len(t) for t in outgoing], self._group
            )
        return list(torch.split(received, list(sizes)))

    def broadcast(self, tensor: Tensor) -> None:
        source = 0 if self._group is None else dist.get_global_rank(self._group, 0)
        with self.told():
            dist.broadcast(tensor, src=source, group=self._group)

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise PeerLostError, which names the workers that are gone, where a collective's network fails."""
        try:
            yield
        except RuntimeError as error:
            if not is_network(error):
                raise
            raise self._lost(error) from error

    def _lost(self, error: RuntimeError) -> PeerLostError:
        group = self._group or dist.group.WORLD
        assert group is not None
        backend: Any = group._get_backend(torch.device("cpu"))
        for peer in range(self.size):
            # A receive that nobody answers: when it times out gloo closes the group's connections, so that workers
            # which wait for this one fail too, and answer the roll call.
            with suppress(RuntimeError):
                if peer != self.rank:
                    backend.recv([torch.empty(1)], peer, _NO_TAG).wait(timedelta(milliseconds=1))
        ranks = dist.get_process_group_ranks(group)
        mine = ranks[self.rank]
        roll = roll_call(group.get_group_store(), mine, ranks)
        return PeerLostError(explanation(roll, mine, self.size, error, backend.options._timeout))


_ambient: ContextVar[Group | None] = ContextVar("packsaddle_group", default=None)


@contextmanager
def ambient_group(group: Group) -> Iterator[None]:
    """Make `group` the one that `resolve(None)` finds in this thread."""
    token = _ambient.set(group)
    try:
        yield
    finally:
        _ambient.reset(token)


def resolve(process_group: Group | dist.ProcessGroup | None) -> Group:
    """Return the group to use: the given one, else a simulated one, else torch's default group, else Solo.

    Raises TypeError for anything that is not a group.
    """
    if isinstance(process_group, Group):
        return process_group
    if process_group is None:
        if (ambient := _ambient.get()) is not None:
            return ambient
        return TorchGroup() if dist.is_available() and dist.is_initialized() else Solo()
    if isinstance(process_group, dist.ProcessGroup):
        return TorchGroup(process_group)
    raise TypeError(f"process_group must be a torch ProcessGroup, a packsaddle Group or None, got {process_group!r}")


@dataclass(frozen=True)
class Bucket:
    """Gradients that DistributedDataParallel hands over together; to be replaced by their means, in place."""

    index: int  # 0 is the first of a backward pass
    is_last: bool
    buffer: Tensor  # float[n], all of them
    gradients: list[Tensor]  # views of the buffer, shaped as their parameters
    parameters: list[Tensor]


def on_buckets(model: DistributedDataParallel, take: Callable[[Bucket], "Future[Tensor]"]) -> None:
    """Let `take` exchange a model's buckets. Raises RuntimeError if the model has a communication hook already."""

    def hook(take: Callable[[Bucket], Future[Tensor]], bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        return take(Bucket(bucket.index(), bucket.is_last(), bucket.buffer(), bucket.gradients(), bucket.parameters()))

    try:
        model.register_comm_hook(take, hook)
    except RuntimeError as error:
        if "can only be called once" not in str(error):
            raise
        raise RuntimeError(
            "this DistributedDataParallel has a communication hook already, and takes no second one; "
            "for another hook wrap model.module anew"
        ) from error


def group_beside(model: DistributedDataParallel) -> Group:
    """Return a new group of the workers of a model's group, so that other collectives can go on at once; collective.

    It has the timeout of the model's own group.
    """
    device = next(model.parameters()).device
    timeout = model.process_group._get_backend(device).options._timeout
    ranks = dist.get_process_group_ranks(model.process_group)
    group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this worker is one of them
    return TorchGroup(group)


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is sharded by FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and there if it is in use
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    return any(isinstance(m, kinds) for m in model.modules())


def sharded_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules that FSDP2 (`fully_shard`) shards, by name."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [(name, m) for name, m in model.named_modules() if fsdp and isinstance(m, fsdp.FSDPModule)]


def shard_rank(model: nn.Module) -> int:
    """Return which shard of a model that FSDP2 shards is this worker's."""
    mesh: Any = next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
    if mesh.ndim != 1:
        raise ValueError(
            f"model must be sharded on a mesh of one dimension, got {mesh.ndim}: with two, FSDP has averaged over the "
            f"replicas before its hook is called"
        )
    return int(mesh.get_local_rank())


def under_launcher() -> bool:
    """Whether torchrun (or any launcher that sets RANK and WORLD_SIZE) started this process.

    Raises ConfigError if the launcher's variables do not make sense.
    """
    there = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(there) == 1:
        raise ConfigError(
            f"{there[0]} is set, but of RANK and WORLD_SIZE a launcher sets both, and without one neither"
        )
    if not there:
        return False
    size = _variable("WORLD_SIZE", 1, 2**31 - 1)
    _variable("RANK", 0, size - 1)
    _variable("LOCAL_WORLD_SIZE", 1, size, default=1)
    _variable("LOCAL_RANK", 0, size - 1, default=0)
    _variable("MASTER_PORT", 1, 65535, default=1)
    return True


def _variable(name: str, least: int, most: int, default: int | None = None) -> int:
    text = os.environ.get(name) if default is None else os.environ.get(name, str(default))
    if text is None or not text.strip().isascii() or not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name}, which the launcher sets, must be from {least} to {most}, got {shown(text)}")
    return int(text)


def check_interface() -> None:
    """Raise ConfigError if gloo is told to listen on an interface that this machine does not have."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    missing = [name for name in named.split(",") if name and there and name not in there]
    if missing:
        raise ConfigError(f"GLOO_SOCKET_IFNAME names {missing[0]}, and this machine has {', '.join(there)}")


def backends() -> dict[str, bool]:
    """Return which of the backends that are used this torch has been built with."""
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}


@contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[Group]:
    """Join the world that the launcher set up (NCCL where every worker has a GPU, else gloo), and leave it.

    Collectives that take longer than `timeout`, by default torch's, raise PeerLostError.
    Raises ConfigError if the world cannot be joined.
    """
    under_launcher()  # checks the variables
    check_interface()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    use_nccl = dist.is_nccl_available() and torch.cuda.device_count() >= local_size
    if use_nccl:
        torch.cuda.set_device(local_rank)
    # Scalars that live on the CPU (metrics, flags) travel by gloo even where vectors go by NCCL.
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_nccl else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch's errors of stores and networks are RuntimeErrors
        raise ConfigError(_not_joined(error)) from error
    try:
        group = TorchGroup()
        yield group
        with group.told():
            dist.barrier()  # a worker that leaves early takes its connections away from the others
    finally:
        # Without this, interpreters that exit while gloo threads live abort now and then.
        dist.destroy_process_group()


def _not_joined(error: Exception) -> str:
    """What to say and do when the world could not be joined; torch's own first line, which has no more, at its end."""
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        advice = f"{place} is in use; name another port with --master-port (MASTER_PORT)"
    elif "environment variable" in reason:
        advice = "start it with torchrun, which sets the variables"
    elif "joined" in reason or "imed out" in reason:
        advice = f"not every worker came to {place} in time; look whether all were started, and whether they reach it"
    else:
        advice = f"look at MASTER_ADDR and MASTER_PORT ({place}) and GLOO_SOCKET_IFNAME"
    return f"the workers could not meet: {advice} ({reason})"


def local_device() -> torch.device:
    """Return this worker's GPU (see `process_group`), or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


class WorkerFailedError(RuntimeError):
    """A launched worker process raised; the message is its first error. `trace` is where, "" if that tells nothing."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


class TerminatedError(RuntimeError):
    """This process was sent SIGTERM, which was passed on to its workers; they have ended since."""


def launch(entry: Callable[..., Any], args: tuple[Any, ...], workers: int) -> Any:
    """Run entry(*args) in `workers` processes under torch's launcher and return rank 0's result.

    `entry` is called with the launcher's environment set (see `process_group`), and must be importable by
    name. Raises WorkerFailedError if a worker fails, ConfigError if that is what it raised, TerminatedError on SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_interface()
    multiprocessing.set_forkserver_preload(["torch", entry.__module__])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="forkserver",  # torch is imported once, and every worker is a clean copy
        monitor_interval=0.1,
    )
    try:
        with _quiet_launcher():
            return elastic_launch(config, entry)(*args)[0]
    except ChildFailedError as error:
        raise _failure(*error.get_first_failure()) from error
    except SignalException as stop:
        if stop.sigval == signal.SIGTERM:
            raise TerminatedError from None
        raise KeyboardInterrupt from None


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep torch's launcher from logging the trace of a failed worker, which `launch` raises."""
    logger = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _failure(rank: int, failure: Any) -> Exception:
    """The error to raise for the first worker that failed."""
    if not isinstance(failure.message, dict):  # killed, or out of memory
        return WorkerFailedError(f"worker {rank} failed: {failure.message}")
    message: str = failure.message["message"]
    kind, _, text = message.partition(": ")
    if kind in ("ConfigError", "MissingExtraError"):
        return ConfigError(text)
    if kind == "PeerLostError":
        return WorkerFailedError(text)
    return WorkerFailedError(f"worker {rank} failed: {message}", failure.message["extraInfo"]["py_callstack"])
