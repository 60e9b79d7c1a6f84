"""Properties of DTensors, and reductions over the processes that have their shards, without importing
torch.distributed."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.group import Group, distinct_groups


def is_split(tensor: Tensor) -> bool:
    """Return True if this process has only a part of the tensor, i.e. if it is a DTensor that is not replicated."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def sharded_over(tensor: Any) -> tuple[Any, ...]:
    """Return the device mesh of a DTensor, and the dimensions of the mesh over which it is sharded; () for a tensor of
    which this process has the whole. The result may be a key of a dict."""
    dims = [i for i, placement in enumerate(getattr(tensor, "placements", ())) if not placement.is_replicate()]
    return (getattr(tensor, "device_mesh", None), *dims) if dims else ()


def shard_of(tensor: Any) -> tuple[int, ...]:
    """Return which shard of a DTensor this process has: its coordinates in the dimensions of the device mesh over which
    the tensor is sharded. Processes with equal coordinates have the same shard. The result is () for a tensor of which
    this process has the whole."""
    mesh, *dims = sharded_over(tensor) or (None,)
    return () if mesh is None else tuple(mesh.get_coordinate()[i] for i in dims)


def local_part(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself if it is plain. The result is detached, and shares its
    memory with `tensor`."""
    here: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return here.detach()


def part_of(tensor: Tensor, p: Any) -> Tensor:
    """Return this process's part of a whole tensor, according to the placements of the parameter p. If p is a plain
    tensor, return the whole tensor. Strided shards are split last; FSDP creates them along a dimension that tensor
    parallelism also shards."""
    placements = list(enumerate(getattr(p, "placements", ())))
    for i, placement in sorted(placements, key=lambda entry: hasattr(entry[1], "split_factor")):
        if hasattr(placement, "dim"):
            chunks = tensor.chunk(p.device_mesh.size(i), placement.dim)
            place = p.device_mesh.get_coordinate()[i]
            tensor = chunks[place] if place < len(chunks) else tensor.narrow(placement.dim, 0, 0)
    return tensor


def as_shard(value: Any, p: Any) -> Any:
    """Return `value` as a DTensor with the placements of the parameter p, if p is a DTensor and `value` is a plain
    tensor with the shape of p's local shard. Otherwise return `value` unchanged."""
    is_part = isinstance(value, Tensor) and hasattr(p, "device_mesh") and not hasattr(value, "device_mesh")
    if not is_part or value.shape != p.to_local().shape:
        return value
    return type(p).from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


class Shards:
    """Reductions over the processes of one worker. All methods are collective over these processes.

    A worker has several processes if its parameters are DTensors, of which each process has a shard, or if the worker
    is a site, i.e. processes that train one model together. For a site, `within` is the group of all its processes. All
    reductions except `total` then include these processes, even if each has the whole model.
    """

    def __init__(self, parameters: Iterable[Any], within: Group | None = None) -> None:
        # Collect the process groups of the DTensors' meshes, each group once. Their order is that of the parameters,
        # which is identical on all processes, as their collectives require.
        meshes: dict[Any, None] = {p.device_mesh: None for p in parameters if hasattr(p, "device_mesh")}
        sharing = [m.get_group(i) for m in meshes for i in range(m.ndim) if m.size(i) > 1]
        # If `within` and the group of a mesh have the same processes, use `within`, since it may support tensors on
        # more devices than the group of the mesh.
        ranks = getattr(within, "ranks", None)
        self._sharing = [within if within and group.ranks == ranks else group for group in distinct_groups(sharing)]
        self.groups = self._sharing if within is None or within in self._sharing else [*self._sharing, within]

    def __call__(self, bad: Tensor) -> Tensor:
        """Return `bad`, bool[...], reduced with OR over all processes of this worker. An element of the result is True
        if this element of `bad` is True on at least one of these processes."""
        return self.digest(bad.to(torch.int32)) > 0 if self.groups else bad

    def any(self, bad: bool, device: torch.device) -> bool:
        """Return True if `bad` is True on at least one of this worker's processes. `device` is the device of the
        reduced tensor."""
        return bool(self(torch.tensor(bad, device=device))) if self.groups else bad

    def digest(self, numbers: Tensor) -> Tensor:
        """Sum `numbers`, integers, over all processes of this worker, in place, and return them. The sum of the
        fingerprints of all shards is a fingerprint of the whole model."""
        for group in self.groups:
            group.all_reduce(numbers)
        return numbers

    def total(self, values: Tensor) -> Tensor:
        """Sum `values`, in place, over the processes that have shards of this worker's DTensors, and return them."""
        for group in self._sharing:
            group.all_reduce(values)
        return values
