"""Properties of DTensors and of models that have them, without importing torch.distributed."""

from typing import Any

from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Return True if any trainable parameter is a DTensor, as with FSDP2 or tensor parallelism."""
    return any(p.requires_grad and hasattr(p, "placements") for p in model.parameters())


def is_replicated(tensor: Tensor) -> bool:
    placements = getattr(tensor, "placements", ())
    return bool(placements) and all(placement.is_replicate() for placement in placements)


def local_part(tensor: Any) -> Tensor:
    """Return the local shard of a DTensor, or another tensor itself; detached, sharing memory."""
    here: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return here.detach()
