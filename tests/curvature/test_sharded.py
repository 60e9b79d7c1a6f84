"""Certificates of models that FSDP2 shards, on gloo processes, against those of the whole model in one."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from nightly import nightly
from searches import certified
from torch import Tensor, nn

from packsaddle import certify
from packsaddle.comm.sharding import part_of
from packsaddle.curvature import Search

EXACT = ("verdict", "examples")  # the start of the search is another, and the numbers of products differ
MEASURED = ("loss", "grad_norm", "lambda_min_upper")


def network() -> tuple[nn.Sequential, list[Tensor]]:
    """A network whose rows do not divide evenly, and batches of unequal sizes."""
    rng = torch.Generator().manual_seed(0)
    widths = (3, 5, 1, 3)
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.7, generator=rng)
    data = torch.randn(25, 3, generator=rng, dtype=torch.float64)
    return model, list(data.split([7, 5, 9, 4]))


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def certificate(model: nn.Module, batches: list[Tensor], **options: Any) -> Any:
    given = {"hvp": "differences", "tolerance": 1e-6, "seed": 3, **options}
    return certified(model, loss_fn, batches, **given)


def sharded(shape: tuple[int, ...]) -> tuple[nn.Module, list[Tensor]]:
    """The network, sharded, and this worker's batches."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model, batches = network()
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, batches[dist.get_rank() :: dist.get_world_size()]


def certify_sharded(shape: tuple[int, ...]) -> dict[str, Any]:
    model, batches = sharded(shape)
    before = [p.to_local().clone() for p in model.parameters()]
    found = certificate(model, batches)
    held = sum(p.to_local().numel() for p in model.parameters())
    assert found.escape_direction.shape == (held,)
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), old)
        assert p.grad is None
    assert found.hvp_reason is None
    return {name: getattr(found, name) for name in (*EXACT, *MEASURED)} | {"held": held}


def test_a_sharded_model_has_the_whole_ones_certificate(gloo: Callable[..., list[Any]]) -> None:
    """Of 2 shards on 2 replicas; vectors have about half of the numbers on each worker."""
    model, batches = network()
    alone = certificate(model, batches)
    d = sum(p.numel() for p in model.parameters())
    many = gloo(certify_sharded, 4, (2, 2))
    assert sum(m["held"] for m in many) == 2 * d
    for found in many:
        assert [found[name] for name in EXACT] == [getattr(alone, name) for name in EXACT]
        for name in MEASURED:  # gradients are summed in another order, of which products keep 1 / h
            assert found[name] == pytest.approx(getattr(alone, name), rel=1e-9, abs=4 * alone.hvp_error + 1e-9)


def refuse() -> list[str]:
    model, batches = sharded((2,))
    told = []
    for hvp in ("double-backward", "auto"):
        mine = batches if hvp == "double-backward" or dist.get_rank() == 0 else []
        with pytest.raises(ValueError, match="sharded model") as caught:
            certify(model, loss_fn, mine, epsilon=1.0, search=Search(hvp=hvp))  # type: ignore[arg-type]
        told.append(str(caught.value))
    return told


def test_what_a_sharded_model_cannot_do_is_refused_by_all(gloo: Callable[..., list[Any]]) -> None:
    first, second = gloo(refuse, 2)
    assert first == second
    assert first[1] == "every worker of a sharded model needs batches, worker 1 has none"


class Mlp(nn.Module):
    """Two layers, sharded by columns and rows, between layers that tensor parallelism leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(1)
        self.inward, self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=rng))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.down(torch.tanh(self.up(torch.tanh(self.inward(x))))))
        return y


def certify_in_tensor_parallel(shape: tuple[int, int], fsdp: bool) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "model"))
    model = Mlp().double()
    whole = [p.detach().clone() for p in model.parameters()]
    parallelize_module(model, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    if fsdp:
        fully_shard(model, mesh=mesh["data"])
    for p, value in zip(model.parameters(), whole, strict=True):
        assert torch.equal(part_of(value, p), p.to_local() if hasattr(p, "to_local") else p)
    _, batches = network()
    mine = batches[mesh["data"].get_local_rank() :: shape[0]]
    told: list[str] = []
    if fsdp:
        for options in ({}, {"tensor_parallel": mesh["data"]}):
            with pytest.raises(ValueError, match="must be sharded over the") as caught:
                certificate(model, mine, **options)
            told.append(str(caught.value))
    found = certificate(model, mine, tensor_parallel=mesh["model"])
    return {**{name: getattr(found, name) for name in (*EXACT, *MEASURED)}, "told": told}


@pytest.mark.parametrize(("shape", "fsdp"), [nightly((1, 2), False), nightly((2, 2), True)], ids=["tensor", "both"])
def test_tensor_parallelism_changes_no_certificate(
    gloo: Callable[..., list[Any]], shape: tuple[int, int], fsdp: bool
) -> None:
    """Alone, with parameters that are whole on both workers, and with FSDP2 along the same dimension (strided shards):
    workers of one tensor-parallel group go through the same examples, which count once."""
    _, batches = network()
    alone = certificate(Mlp().double(), batches)
    for found in gloo(certify_in_tensor_parallel, shape[0] * shape[1], shape, fsdp):
        assert [found[name] for name in EXACT] == [getattr(alone, name) for name in EXACT]
        for name in MEASURED:
            assert found[name] == pytest.approx(getattr(alone, name), rel=1e-9, abs=4 * alone.hvp_error + 1e-9)
        assert len(found["told"]) == (2 if fsdp else 0)


def many() -> list[Tensor]:
    rng = torch.Generator().manual_seed(5)
    return list(torch.randn(640, 3, generator=rng, dtype=torch.float64).split(8))


def certify_sampled(shape: tuple[int, ...]) -> dict[str, Any]:
    model, _ = sharded(shape)
    found = certified(model, loss_fn, many()[dist.get_rank() :: dist.get_world_size()])
    return {name: getattr(found, name) for name in (*EXACT, *MEASURED, "sample_examples", "hvp", "escape_loss")}


@pytest.mark.parametrize("shape", [(2,), (2, 2)], ids=["two", "four"])
def test_a_saddle_of_a_sharded_model_is_found_on_a_sample(
    gloo: Callable[..., list[Any]], shape: tuple[int, ...]
) -> None:
    """The curvature along what each finds is within the other's residual of the smallest eigenvalue."""
    model, _ = network()
    alone = certified(model, loss_fn, many(), tolerance=1e-6)
    for found in gloo(certify_sampled, math.prod(shape), shape):
        assert [found[name] for name in EXACT] == [getattr(alone, name) for name in EXACT]
        assert found["loss"] == pytest.approx(alone.loss, rel=1e-12)
        assert 8 <= found["sample_examples"] <= 160
        assert found["hvp"] == "differences of gradients"
        assert alone.lambda_min_lower <= found["lambda_min_upper"] < alone.threshold
        assert found["escape_loss"] < alone.loss
