"""Groups of workers: four collectives over one process, a torch.distributed process group, or threads.

`Solo` is the group of one worker and `TorchGroup` a torch.distributed process group (gloo or NCCL).
`packsaddle.simulate` adds a group of threads.

A `StagingGroup` stages tensors that its backends cannot exchange directly: those on MPS, on XPU without xccl, and on
CUDA with gloo. They are copied to the host, exchanged there by gloo, and copied back. Only the calling thread and the
current stream wait for these copies, so an exchange in a background thread overlaps with training.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from packsaddle.comm.failures import PeerLostError, explanation, is_network, roll_call
from packsaddle.errors import ConfigError
from packsaddle.numerics.devices import assign, to_device, to_host

ProcessGroup = dist.ProcessGroup
# Size in bytes of the largest tensor that an all-gather between more than two workers sends by an all-to-all, i.e.
# concurrently to all workers. Larger tensors are sent by gloo's ring, in which each worker sends W - 1 messages one
# after the other.
SMALL = 4096
_NO_TAG = 7_654_321  # message tag for a receive that no send matches
_CPU = torch.device("cpu")


class Group(ABC):
    """Workers that call the same collectives in the same order. `rank` is this worker's index, and `size` is the number
    W of the workers."""

    rank: int
    size: int
    processes = 1  # number of processes that form one worker and divide its messages
    leads = True  # True if this is the process that logs for its worker
    may_shrink = False  # True if workers may leave; a collective then fails if a worker leaves during it

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> None:
        """Replace the tensor with its sum over workers, in place. Shapes and dtypes must match on all workers."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Return every worker's tensor, by rank. Shapes and dtypes must match on all workers."""

    @abstractmethod
    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        """Send the flat tensor outgoing[r] to worker r. Return the received tensors, by rank; the tensor from rank r
        has sizes[r] elements."""

    @abstractmethod
    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite the tensor with the tensor of rank 0, in place. Shapes and dtypes must match on all workers."""

    def background(self, device: torch.device) -> "Group | None":
        """Return a new group of the same workers, whose collectives can run at the same time as those of this group;
        collective. Returns None if collectives of this group cannot overlap other work."""
        return None

    def stages(self, device: torch.device) -> bool:
        """Return True if collectives of tensors on `device`, an accelerator, copy them to the host and back, so that
        the host waits."""
        return False

    def accepts(self, device: torch.device) -> bool:
        """Return True if the group can exchange tensors on `device`. If it returns False, the group that `background`
        returns can exchange them."""
        return True


class Solo(Group):
    """A group of one worker; its collectives are no-ops."""

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


class StagingGroup(Group):
    """Base class of groups that copy some tensors of accelerators to the host, exchange the copies there, and copy the
    result back. These are the tensors on devices for which the method `stages` returns True. Subclasses override
    `stages`, and implement the collectives without such copies, `_all_reduce` and so on."""

    _all_reduce: Callable[[Tensor], None]
    _all_gather: Callable[[Tensor], list[Tensor]]
    # _all_to_all(outgoing, lengths, sizes) divides `outgoing` into parts of lengths[r] elements, and sends part r to
    # worker r. It returns the received parts, concatenated; the part from rank r has sizes[r] elements.
    _all_to_all: Callable[[Tensor, Sequence[int], Sequence[int]], Tensor]
    _broadcast: Callable[[Tensor], None]

    def all_reduce(self, tensor: Tensor) -> None:
        self._in_place(self._all_reduce, tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [to_device(t, tensor.device) for t in self._all_gather(self._staged(tensor))]

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        joined = torch.cat(list(outgoing))  # a single copy to the host, for all messages
        received = self._all_to_all(self._staged(joined), [len(t) for t in outgoing], sizes)
        return list(torch.split(to_device(received, joined.device), list(sizes)))

    def broadcast(self, tensor: Tensor) -> None:
        self._in_place(self._broadcast, tensor)

    def _in_place(self, collective: Callable[[Tensor], None], tensor: Tensor) -> None:
        collective(staged := self._staged(tensor))
        if staged is not tensor:
            assign(tensor, staged)

    def _staged(self, tensor: Tensor) -> Tensor:
        return to_host(tensor) if self.stages(tensor.device) else tensor


class TorchGroup(StagingGroup):
    """A torch.distributed process group, by default torch's default group."""

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self._group = process_group
        self.rank = dist.get_rank(process_group)
        self.size = dist.get_world_size(process_group)

    @property
    def ranks(self) -> list[int]:
        """The ranks that the workers of this group have in torch's default group, in order."""
        return dist.get_process_group_ranks(self.process_group)

    @property
    def process_group(self) -> dist.ProcessGroup:
        group = self._group or dist.group.WORLD
        assert group is not None
        return group

    def _all_reduce(self, tensor: Tensor) -> None:
        with self.naming_lost_workers():
            dist.all_reduce(tensor, group=self._group)

    def _all_gather(self, tensor: Tensor) -> list[Tensor]:
        if self.size > 2 and tensor.device.type == "cpu" and 0 < tensor.nbytes <= SMALL:
            stacked = tensor.new_empty((self.size, *tensor.shape))
            with self.naming_lost_workers():
                dist.all_to_all_single(stacked, tensor.expand_as(stacked).contiguous(), group=self._group)
            return list(stacked.unbind())
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.naming_lost_workers():
            dist.all_gather(gathered, tensor, group=self._group)
        return gathered

    def _all_to_all(self, outgoing: Tensor, lengths: Sequence[int], sizes: Sequence[int]) -> Tensor:
        received = outgoing.new_empty(sum(sizes))
        with self.naming_lost_workers():
            dist.all_to_all_single(received, outgoing, list(sizes), list(lengths), self._group)
        return received

    def _broadcast(self, tensor: Tensor) -> None:
        whole = tensor.contiguous()  # gloo ignores strides when it writes into a tensor
        data = whole.view(-1).view(torch.uint8)  # sent as bytes, since gloo has no 16-bit integers and no 8-bit floats
        with self.naming_lost_workers():
            dist.broadcast(data, src=self.ranks[0], group=self._group)
        if whole is not tensor:
            tensor.copy_(whole)

    def background(self, device: torch.device) -> Group:
        return TorchGroup(same_workers(self.process_group, device))

    def stages(self, device: torch.device) -> bool:
        return stages(self.process_group, device)

    def accepts(self, device: torch.device) -> bool:
        return accepts(self.process_group, device)

    @contextmanager
    def naming_lost_workers(self) -> Iterator[None]:
        """Context manager that converts a network error of a collective to PeerLostError, which names the lost
        workers."""
        try:
            yield
        except RuntimeError as error:
            if not is_network(error):
                raise
            # Post a receive that no send matches. When it times out, gloo closes the connections of the group, so that
            # workers that wait for this one fail too and answer the roll call. With NCCL those workers fail at their
            # own timeouts.
            if carries(self.process_group, _CPU):
                backend: Any = self.process_group._get_backend(_CPU)
                for peer in set(range(self.size)) - {self.rank}:
                    with suppress(RuntimeError):
                        backend.recv([torch.empty(1)], peer, _NO_TAG).wait(timedelta(milliseconds=1))
            mine = self.ranks[self.rank]
            roll = roll_call(self.process_group.get_group_store(), mine, self.ranks)
            timeout = timeout_of(self.process_group)
            raise PeerLostError(explanation(roll, mine, self.size, error, timeout)) from error


_ambient: ContextVar[Group | None] = ContextVar("packsaddle_group", default=None)


def backend_for(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the name of a process group's backend for the type of `device`, such as "gloo". Returns None if the group
    has no backend for this type."""
    pairs = (part.split(":") for part in dist.get_backend_config(group).split(","))
    return dict(pairs).get(device.type)


def carries(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if a process group has a backend that exchanges tensors on `device` without copies to the host. gloo
    does so only for tensors on the CPU: it copies tensors of an accelerator, and blocks the host meanwhile."""
    return backend_for(group, device) not in ((None,) if device.type == "cpu" else (None, "gloo"))


def stages(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if tensors on `device`, an accelerator, are copied to the host for a group's collectives."""
    return device.type != "cpu" and not carries(group, device)


def accepts(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if a group can exchange tensors on `device`, either directly or by copies on the host."""
    return carries(group, device) or backend_for(group, torch.device("cpu")) is not None


@contextmanager
def ambient_group(group: Group) -> Iterator[None]:
    """Context manager of a block in which `resolve(None)` returns `group`, in this thread."""
    token = _ambient.set(group)
    try:
        yield
    finally:
        _ambient.reset(token)


def resolve(process_group: Group | dist.ProcessGroup | None) -> Group:
    """Return `process_group` as a `Group`. If it is None, return the simulated group of this thread. Without a
    simulation return torch's default group, or `Solo` if torch.distributed is not initialized. Raises TypeError if
    `process_group` is not a group or None."""
    if isinstance(process_group, Group):
        return process_group
    if process_group is None:
        if (ambient := _ambient.get()) is not None:
            return ambient
        return TorchGroup() if dist.is_available() and dist.is_initialized() else Solo()
    if isinstance(process_group, dist.ProcessGroup):
        return TorchGroup(process_group)
    raise TypeError(f"process_group must be a torch ProcessGroup, a packsaddle Group or None, got {process_group!r}")


def distinct_groups(process_groups: Iterable[dist.ProcessGroup]) -> list[TorchGroup]:
    """Return the groups of `process_groups` without duplicates, i.e. one group for each distinct set of processes, in
    the order in which the sets first appear."""
    return [TorchGroup(group) for group in {tuple(dist.get_process_group_ranks(g)): g for g in process_groups}.values()]


def training_group(process_group: Group | dist.ProcessGroup | None) -> Group:
    """Return the group to train in, as `resolve` does. Raises RuntimeError if a launcher started several processes
    (WORLD_SIZE) but torch.distributed has no process group, and ConfigError if WORLD_SIZE is not a number. An explicit
    `Solo()` is accepted."""
    group = resolve(process_group)
    is_alone = process_group is None and _ambient.get() is None and isinstance(group, Solo)
    if is_alone and launched_number("WORLD_SIZE", 1) > 1:
        raise RuntimeError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but torch.distributed has no process group, so each process "
            f"would train alone: call torch.distributed.init_process_group() before, or unset WORLD_SIZE"
        )
    return group


def launched_number(name: str, default: int) -> int:
    """Return a number that the launcher has set as the environment variable `name`, such as LOCAL_RANK, or `default` if
    the variable is not set. Raises ConfigError if the variable is no integer of 0 or more."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name} must be an integer of 0 or more, as torchrun sets it, got {text!r}")
    return int(text)


def same_workers(process_group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """Return a new process group with the workers and the timeout of `process_group`; collective. The new group has
    the backends of `process_group` if these can exchange tensors on `device`, and otherwise only gloo."""
    ranks, timeout = dist.get_process_group_ranks(process_group), timeout_of(process_group)
    backend = dist.get_backend_config(process_group) if accepts(process_group, device) else "gloo"
    group = dist.new_group(ranks, timeout=timeout, backend=backend, use_local_synchronization=True)
    # `new_group` returns a placeholder instead of a group only to workers that are not members, but this worker is one.
    assert isinstance(group, dist.ProcessGroup)
    return group


def timeout_of(process_group: dist.ProcessGroup) -> Any:
    kinds: Any = process_group
    return process_group._get_backend(kinds._device_types[0]).options._timeout


def backends() -> dict[str, bool]:
    return {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
