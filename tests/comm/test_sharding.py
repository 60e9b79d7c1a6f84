"""Properties of DTensors, on a mesh of one process."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from packsaddle.comm.sharding import is_split, local_part


def look() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(6.0)
    sharded, copied = (distribute_tensor(whole.clone(), mesh, [placement]) for placement in (Shard(0), Replicate()))
    model = nn.Linear(2, 2)
    model.weight = nn.Parameter(distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)]))
    part = local_part(model.weight)
    part.zero_()  # in the same memory, and without a graph
    return {
        "split": [is_split(t) for t in (whole, sharded, copied)],
        "parts": [local_part(t).tolist() for t in (whole, sharded, copied)],
        "left": float(model.weight.detach().to_local().abs().sum()),
        "leaf": part.requires_grad,
    }


def test_shards_and_copies_are_told_apart(gloo: Callable[..., list[Any]]) -> None:
    first, second = gloo(look, 2)
    numbers = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert first["parts"] == [numbers, numbers[:3], numbers]
    assert second["parts"] == [numbers, numbers[3:], numbers]
    for found in (first, second):
        assert found["split"] == [False, True, False]
        assert (found["left"], found["leaf"]) == (0.0, False)
