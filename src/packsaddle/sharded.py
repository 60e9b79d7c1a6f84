"""What a model is to FSDP, asked without importing it."""

import sys
from typing import Any

from torch import nn


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
