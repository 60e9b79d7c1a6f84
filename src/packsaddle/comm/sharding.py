"""Properties of DTensors and of models that have them, without importing torch.distributed."""

from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return True if any trainable parameter is a DTensor, as with FSDP2 or tensor parallelism."""
    return any(p.requires_grad and hasattr(p, "placements") for p in model.parameters())


def is_split(tensor: Tensor) -> bool:
    """Return True if this process has only a part of the tensor, as of a sharded DTensor."""
    return any(not placement.is_replicate() for placement in getattr(tensor, "placements", ()))


def local_part(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, or a plain tensor itself; the result is detached and shares memory."""
    here: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return here.detach()


def as_shard(value: Any, p: Any) -> Any:
    """Return a tensor that is shaped as the local shard of a DTensor, the parameter p, as a DTensor. Other values are
    returned unchanged."""
    is_part = isinstance(value, Tensor) and hasattr(p, "device_mesh") and not hasattr(value, "device_mesh")
    if not is_part or value.shape != p.to_local().shape:
        return value
    return type(p).from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def part_of(tensor: Tensor, p: Any) -> Tensor:
    """Return this worker's part of a whole tensor, by the placements of the parameter p, or all of it for a plain p.
    A strided shard, as FSDP makes along a dimension that tensor parallelism also shards, is split after other shards.
    """
    placements = list(enumerate(getattr(p, "placements", ())))
    for i, placement in sorted(placements, key=lambda entry: hasattr(entry[1], "split_factor")):
        if hasattr(placement, "dim"):
            chunks = tensor.chunk(p.device_mesh.size(i), placement.dim)
            place = p.device_mesh.get_coordinate()[i]
            tensor = chunks[place] if place < len(chunks) else tensor.narrow(placement.dim, 0, 0)
    return tensor
