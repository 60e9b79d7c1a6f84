"""Sites: workers that consist of several processes, which train one model together and divide the messages to other
sites.

A site may shard the model over its processes, as FSDP2 does. Each process then exchanges its shard with its peers, the
processes of the other sites that have the same shard. Or each process has the whole model, as in
DistributedDataParallel. `SiteGroup` then divides every message among the processes of the site.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh as DeviceMesh

from packsaddle.comm.failures import PeerLostError
from packsaddle.comm.group import Group, TorchGroup, training_group
from packsaddle.errors import ConfigError


@contextmanager
def fail_together(site: Group) -> Iterator[None]:
    """Context manager that raises an error on all processes of a site, i.e. of a worker with several processes, if the
    block of the context manager raises an error on one of these processes; collective.

    A ConfigError, and the PeerLostError that reports a lost process of the site, are raised only on the process on
    which they occur.
    """
    error: Exception | None = None
    try:
        yield
    except (ConfigError, PeerLostError):
        raise
    except Exception as found:  # torchft raises errors of several types
        error = found
    failed = torch.tensor([error is not None], dtype=torch.int32)
    site.all_reduce(failed)
    if failed:
        raise error or RuntimeError("another process of this site failed")


class SiteGroup(Group):
    """A group whose workers are sites, i.e. sets of processes that train one model together. Each process has the whole
    model. `rank` is the index of this site, and `size` the number of sites.

    Each process exchanges its part of a tensor with its peers, and then gathers the other parts within the site. Every
    process of a site must call the same collectives with the same values.

    Args:
        within: the group of this site's processes.
        peers: the group of this process and its peers, one process in each site. If workers may leave this group, a
            collective that fails on one process of the site fails on all processes of the site.
    """

    def __init__(self, within: Group, peers: Group) -> None:
        self.within, self.peers = within, peers
        self.processes = within.size
        self.leads = peers.leads = within.rank == 0

    @property
    def rank(self) -> int:  # type: ignore[override]
        return self.peers.rank

    @property
    def size(self) -> int:  # type: ignore[override]
        return self.peers.size

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        return getattr(self.peers, "process_group", None)

    def _together(self) -> AbstractContextManager[None]:
        return fail_together(self.within) if self.peers.may_shrink else nullcontext()

    def _in_place(self, collective: Callable[[Tensor], None], tensor: Tensor) -> None:
        part = self._part(tensor)
        with self._together():
            collective(part)
        tensor.copy_(self._gathered(part).reshape(-1)[: tensor.numel()].view_as(tensor))

    def all_reduce(self, tensor: Tensor) -> None:
        self._in_place(self.peers.all_reduce, tensor)

    def broadcast(self, tensor: Tensor) -> None:
        self._in_place(self.peers.broadcast, tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        with self._together():
            parts = self.peers.all_gather(self._part(tensor))
        gathered = self._gathered(torch.stack(parts))
        return [of_site.reshape(-1)[: tensor.numel()].view_as(tensor) for of_site in gathered.unbind(1)]

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        lengths = [self._length(size) for size in sizes]
        with self._together():
            parts = self.peers.all_to_all(list(map(self._part, outgoing)), lengths)
        received = self._gathered(torch.cat(parts))
        pieces = zip(torch.split(received, lengths, 1), sizes, strict=True)
        return [of_site.reshape(-1)[:size] for of_site, size in pieces]

    def _length(self, size: int) -> int:
        """Return the number of elements that each process exchanges, if `size` elements are divided among the processes
        of a worker."""
        return -(-size // self.processes)

    def _part(self, tensor: Tensor) -> Tensor:
        """Return a flat copy of the part of a tensor that this process exchanges for its worker. All parts have equal
        lengths, so the last parts are padded with zeros."""
        length, flat = self._length(tensor.numel()), tensor.reshape(-1)
        part = flat.new_zeros(length)
        mine = flat[self.within.rank * length :][:length]
        part[: len(mine)] = mine
        return part

    def _gathered(self, part: Tensor) -> Tensor:
        """Gather the tensors `part` of all processes of this worker, and return them stacked along a new first
        dimension."""
        data = part.view(torch.uint8) if part.numel() else part  # gloo has no 16-bit integers and no 8-bit floats
        return torch.stack(self.within.all_gather(data)).view(part.dtype)

    def stages(self, device: torch.device) -> bool:
        return self.within.stages(device) or self.peers.stages(device)

    def accepts(self, device: torch.device) -> bool:
        return self.within.accepts(device) and self.peers.accepts(device)

    def background(self, device: torch.device) -> Group | None:
        within, peers = self.within.background(device), self.peers.background(device)
        return SiteGroup(within, peers) if within and peers else None


def group_of_workers(given: Group | dist.ProcessGroup | DeviceMesh | None) -> Group:
    """Return the group to train in; collective for a mesh of three dimensions.

    If `given` is not a mesh, the group is the result of `training_group`. If `given` is a mesh, the group is that of
    the sites. The first dimension of the mesh is the index of the site, and all other dimensions are the processes of
    one site. In a mesh of one dimension each site is a single process.
    """
    if not isinstance(given, DeviceMesh):
        return training_group(given)
    if given.ndim == 1:
        return TorchGroup(given.get_group(0))
    mine = given.mesh[given.get_local_rank(0)].flatten().tolist()
    within = given.get_group(1) if given.ndim == 2 else dist.new_group(mine, use_local_synchronization=True)
    assert isinstance(within, dist.ProcessGroup)
    return SiteGroup(TorchGroup(within), TorchGroup(given.get_group(0)))
