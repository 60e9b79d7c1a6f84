"""What a model is to FSDP, asked without importing it."""

import sys
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Whether a model, or a part of it, is sharded by FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and there if it is in use
    kinds = (fsdp.FSDPModule, fsdp.FullyShardedDataParallel) if fsdp else ()
    return any(isinstance(m, kinds) for m in model.modules())


def sharded_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the modules that FSDP2 (`fully_shard`) shards, by name."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return [(name, m) for name, m in model.named_modules() if fsdp and isinstance(m, fsdp.FSDPModule)]


def local_shards(model: nn.Module, *, gradients: bool = False) -> list[tuple[str, Tensor]]:
    """Return this worker's shard of every parameter that FSDP2 shards, by name, or of its gradient, where it has one.

    Outside of forward and backward passes, in which parameters are whole.
    """
    found: list[tuple[str, Tensor]] = []
    for name, p in model.named_parameters():
        sharded: Any = p.grad if gradients else p.detach()
        if hasattr(sharded, "to_local"):
            found.append((name, sharded.to_local()))
    return found


def padded_size(model: nn.Module) -> int:
    """Return the coordinates of this worker's gradients, whose shards are padded to equal lengths (dimension 0)."""
    shards, found = int(_mesh(model).size()), 0
    for p in model.parameters():
        if hasattr(p, "to_local") and p.requires_grad:
            rows = p.shape[0] if p.ndim else 1
            found += -(-rows // shards) * (p.numel() // max(rows, 1))
    return found


def shard_of(model: nn.Module) -> tuple[int, int]:
    """Return which shard of a model that FSDP2 shards is this worker's, and of how many."""
    mesh = _mesh(model)
    if mesh.ndim != 1:
        raise ValueError(
            f"model must be sharded on a mesh of one dimension, got {mesh.ndim}: with two, FSDP has averaged over the "
            f"replicas before its hook is called"
        )
    return int(mesh.get_local_rank()), int(mesh.size())


def mesh_device(model: nn.Module) -> torch.device:
    """Return the device of the workers that share a model, also if its weights are elsewhere, or not made yet."""
    return torch.device(_mesh(model).device_type)


def _mesh(model: nn.Module) -> Any:
    return next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
