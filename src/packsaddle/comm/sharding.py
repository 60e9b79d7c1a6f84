"""Properties of DTensors, without importing torch.distributed."""

from typing import Any

from torch import Tensor


def is_split(tensor: Tensor) -> bool:
    """Return True if this process has only a part of the tensor, i.e. if it is a DTensor that is not replicated."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def local_part(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, or the tensor itself if it is plain. The result is detached, and shares its
    memory with `tensor`."""
    here: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return here.detach()


def as_shard(value: Any, p: Any) -> Any:
    """Return `value` as a DTensor with the placements of the parameter p, if p is a DTensor and `value` is a plain
    tensor with the shape of p's local shard. Otherwise return `value` unchanged."""
    is_part = isinstance(value, Tensor) and hasattr(p, "device_mesh") and not hasattr(value, "device_mesh")
    if not is_part or value.shape != p.to_local().shape:
        return value
    return type(p).from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
