"""Small messages between gloo processes are sent to all workers at once; large ones pass around a ring."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from packsaddle.comm.group import SMALL, TorchGroup

Gloo = Callable[..., list[Any]]
SHAPES = [(torch.int64, (2,)), (torch.uint8, (SMALL,)), (torch.uint8, (SMALL + 1,)), (torch.float32, ())]
SHAPES += [(torch.float64, (3, 5)), (torch.bfloat16, (7,)), (torch.float32, (0,))]


def gathered() -> tuple[list[Any], list[str]]:
    """The tensors of all workers for each of `SHAPES`, and the collectives of torch that brought them."""
    group, found, calls = TorchGroup(), [], []
    at_once = mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single)
    in_a_ring = mock.patch.object(dist, "all_gather", wraps=dist.all_gather)
    for dtype, shape in SHAPES:
        mine = torch.full(shape, 1 + group.rank, dtype=torch.float64).to(dtype)
        with at_once as whole, in_a_ring as ring:
            found.append([(t.dtype, tuple(t.shape), t.double().sum().item()) for t in group.all_gather(mine)])
            assert whole.call_count + ring.call_count == 1
            calls.append("at once" if whole.called else "ring")
    return found, calls


@pytest.mark.parametrize("workers", [2, 3])
def test_every_worker_has_every_tensor(gloo: Gloo, workers: int) -> None:
    expected = [
        [(dtype, shape, float((1 + rank) * torch.Size(shape).numel())) for rank in range(workers)]
        for dtype, shape in SHAPES
    ]
    for found, calls in gloo(gathered, workers):
        assert found == expected
        small = "at once" if workers > 2 else "ring"
        assert calls == [small, small, "ring", small, small, small, "ring"]
