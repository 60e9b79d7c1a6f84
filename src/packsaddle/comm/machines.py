"""Machines as workers: one process per machine uses the slow network, and broadcasts each result within the machine.

For machines whose processes train one copy of the model, for example with DistributedDataParallel within the machine.
"""

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from packsaddle.comm import devices
from packsaddle.comm.group import Group, TorchGroup, same_workers


class MachineGroup(Group):
    """A group whose workers are machines: `rank` is the index of this process's machine, `size` the number of machines.

    `within` is the process group of this machine, for DistributedDataParallel(model, process_group=group.within).
    `process_group` has one process of each machine. Every process of a machine must call the same collectives with the
    same values.
    """

    def __init__(self, within: dist.ProcessGroup, between: dist.ProcessGroup) -> None:
        self.within, self.process_group = within, between
        self.rank, self.size = dist.get_rank(between), dist.get_world_size(between)
        self.sends = dist.get_rank(within) == 0
        self._within, self._between = TorchGroup(within), TorchGroup(between) if self.sends else None

    def all_reduce(self, tensor: Tensor) -> None:
        if self._between is not None:
            self._between.all_reduce(tensor)
        self._within.broadcast(tensor)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        if self._between is not None:
            gathered = torch.stack(self._between.all_gather(tensor))
        else:
            gathered = tensor.new_empty((self.size, *tensor.shape))
        self._within.broadcast(gathered)
        return list(gathered.unbind(0))

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        if self._between is not None:
            received = torch.cat(self._between.all_to_all(outgoing, sizes))
        else:
            received = outgoing[0].new_empty(sum(sizes))
        self._within.broadcast(received)
        return list(torch.split(received, list(sizes)))

    def broadcast(self, tensor: Tensor) -> None:
        if self._between is not None:
            self._between.broadcast(tensor)
        self._within.broadcast(tensor)

    def stages(self, device: torch.device) -> bool:
        return any(devices.stages(group, device) for group in (self.within, self.process_group))

    def accepts(self, device: torch.device) -> bool:
        return all(devices.accepts(group, device) for group in (self.within, self.process_group))

    def background(self, device: torch.device) -> Group:
        return MachineGroup(same_workers(self.within, device), same_workers(self.process_group, device))


def machine_group(processes: int | None = None) -> MachineGroup:
    """Return the group of machines; collective over all processes.

    Each machine has `processes` processes, of consecutive ranks; None: torchrun's LOCAL_WORLD_SIZE. Raises ValueError
    unless `processes` divides the world size.

    >>> import torch.distributed as dist
    >>> from packsaddle.comm import machine_group
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> group = machine_group(processes=1)
    >>> group.rank, group.size, dist.get_world_size(group.within)
    (0, 1, 1)
    >>> dist.destroy_process_group()
    """
    each = int(os.environ.get("LOCAL_WORLD_SIZE", "0")) if processes is None else processes
    rank, world = dist.get_rank(), dist.get_world_size()
    if each < 1 or world % each:
        raise ValueError(f"processes must divide the {world} processes there are, got {each}")
    machine, first = divmod(rank, each)
    within = dist.new_group(range(machine * each, (machine + 1) * each), use_local_synchronization=True)
    # On all processes, even if they do not send: torch names a group by the number of groups made, which must match.
    between = dist.new_group(range(first, world, each), use_local_synchronization=True)
    assert isinstance(within, dist.ProcessGroup)
    assert isinstance(between, dist.ProcessGroup)
    return MachineGroup(within, between)
