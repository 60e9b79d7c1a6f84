"""Groups of workers. This is the only module that imports torch.distributed.

A group has four collectives. `Solo` is the group of one, `TorchGroup` a torch.distributed process group (gloo
or NCCL); `packsaddle.simulate` adds a group of threads. What to send is `average`'s part, counting bytes `channel`'s.
"""

import logging
import multiprocessing
import os
import signal
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
from torch import Tensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from packsaddle import ending
from packsaddle.failure import TerminatedError, failure_of
from packsaddle.meeting import agree
from packsaddle.missing import PeerLostError, explanation, is_network, roll_call
from packsaddle.schema import ConfigError
from packsaddle.world import check_interface, not_joined, under_launcher

ProcessGroup = dist.ProcessGroup
_NO_TAG = 7_654_321  # of messages that nobody sends
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")


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
    timeout = model.process_group._get_backend(next(model.parameters()).device).options._timeout
    ranks = dist.get_process_group_ranks(model.process_group)
    group = dist.new_group(ranks, timeout=timeout, use_local_synchronization=True)
    assert isinstance(group, dist.ProcessGroup)  # this worker is one of them
    return TorchGroup(group)


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
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_nccl else "gloo", timeout=timeout, **_meeting(timeout))
    except (RuntimeError, ValueError) as error:  # torch's errors of stores and networks are RuntimeErrors
        raise ConfigError(not_joined(error)) from error
    try:
        group = TorchGroup()
        yield group
        with group.told():
            dist.barrier()  # a worker that leaves early takes its connections away from the others
    finally:
        # Without this, interpreters that exit while gloo threads live abort now and then.
        dist.destroy_process_group()


def _meeting(timeout: timedelta | None) -> dict[str, Any]:
    """What `init_process_group` needs where torchrun may have started others before in this meeting place."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return {}
    rank, size, patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout or timedelta(minutes=30)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any = dist.TCPStore(address, port, size, False, patience)  # type: ignore[attr-defined]
    word = agree(store, rank, size, patience.total_seconds())
    store = dist.PrefixStore(f"packsaddle/{word}", store)  # type: ignore[attr-defined]
    return {"store": store, "rank": rank, "world_size": size}


def local_device() -> torch.device:
    """Return this worker's GPU (see `process_group`), or the CPU if there is none."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


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
        with _quiet_launcher(), ending.soon():
            return elastic_launch(config, ending.when_told)(entry, *args)[0]
    except ChildFailedError as error:
        raise failure_of(*error.get_first_failure()) from error
    except SignalException as stop:
        raise (TerminatedError if stop.sigval == signal.SIGTERM else KeyboardInterrupt) from None


@contextmanager
def _quiet_launcher() -> Iterator[None]:
    """Keep torch's launcher from logging the trace of a failed worker, which `launch` raises."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
