"""The inner optimizer of local updates: its parameters by name, their shards, its steps."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.group import resolve
from packsaddle.comm.sharding import local_part
from packsaddle.feedback.parameters import check_no_shared_memory


def follow(optimizer: Any, local: object) -> None:
    """Note on an optimizer what exchanges its steps, as `exchanged_by`; it is not in the optimizer's state.

    Raises RuntimeError if something does already: workers would exchange every change twice.
    """
    if getattr(optimizer, "exchanged_by", None) is not None:
        raise RuntimeError(
            f"optimizer has LocalUpdates already, and a second one would exchange as well: use the first, or make "
            f"{type(optimizer).__name__} anew"
        )
    optimizer.exchanged_by = local


def named_parameters(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's parameters by name; by number if two groups have a name in common."""
    groups = optimizer.param_groups
    names = [name for group in groups for name in group.get("param_names", [])]
    parameters = [p for group in groups for p in group["params"]]
    if len(set(names)) < len(parameters):
        names = [f"parameter {i}" for i in range(len(parameters))]
    return dict(zip(names, parameters, strict=True))


def check_no_others(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Raise RuntimeError if an optimizer trains any but these parameters: workers would step them apart."""
    known = {id(p) for p in parameters}
    for i, group in enumerate(optimizer.param_groups):
        for p in group["params"]:
            if p.requires_grad and id(p) not in known:
                raise RuntimeError(
                    f"a parameter of shape {list(p.shape)} in group {i} of the optimizer was added or unfrozen after "
                    f"LocalUpdates was made, which would not exchange it: have all that will ever be trained when it "
                    f"is made, and freeze (requires_grad_(False)) afterwards what is to wait"
                )


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless they are floating point, on one device, and share no memory."""
    if not parameters:
        raise ValueError("optimizer must have parameters that require gradients, and has none")
    parts = {name: local_part(p) for name, p in parameters.items()}
    device = next(iter(parts.values())).device
    for name, part in parts.items():
        if not part.is_floating_point():
            raise ValueError(f"parameters must be floating point, but {name} is {part.dtype}")
        if part.device != device:
            raise ValueError(f"parameters must be on one device, but {name} is on {part.device} and others on {device}")
    check_no_shared_memory(parts, "parameters")


class Shards:
    """Agreement of the processes that have shards of one worker's parameters, by the meshes of DTensors."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        meshes: set[Any] = {p.device_mesh for p in parameters if hasattr(p, "device_mesh")}
        self._groups = [resolve(mesh.get_group(i)) for mesh in meshes for i in range(mesh.ndim) if mesh.size(i) > 1]

    def __call__(self, bad: Tensor) -> Tensor:
        """Return whether it is so on any shard, bool[]; collective over the shards."""
        if not self._groups:
            return bad
        found = bad.to(torch.int32).reshape(1)
        for group in self._groups:
            group.all_reduce(found)
        return found[0] > 0
