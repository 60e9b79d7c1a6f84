"""Local updates of models that are sharded or wrapped: FSDP2, tensor parallelism, DistributedDataParallel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from specs import local_options
from torch import Tensor, nn

from packsaddle import Compression, Identity, LocalUpdates, TopK, Workers, keep_gradients_local
from packsaddle.comm import Solo

Gloo = Callable[..., list[Any]]
WHOLE = Compression(Identity(), dense_below=0)


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def train(model: nn.Module, replica: int, steps: int, **options: Any) -> LocalUpdates:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    local = LocalUpdates(optimizer, every=3, **local_options(**options))
    rng = torch.Generator().manual_seed(replica)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 6, generator=rng)).square().mean().backward()
        optimizer.step()
    return local


def whole(model: nn.Module) -> list[Tensor]:
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]  # type: ignore[operator]


def noisy_shards() -> Tensor:
    """Return this process's shard after a round of steps by 0."""
    from torch.distributed.fsdp import fully_shard

    grid = mesh()
    model = nn.Linear(200, 8, bias=False)
    nn.init.zeros_(model.weight)
    fully_shard(model, mesh=grid["shard"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    workers = Workers(grid["replicate"].get_group())
    LocalUpdates(optimizer, Compression(Identity(), dense_below=0), every=1, noise=1.0, workers=workers)
    model(torch.ones(2, 200)).sum().backward()
    optimizer.step()
    return next(model.parameters()).to_local().detach().flatten()  # type: ignore[attr-defined]


def test_shards_have_noise_of_their_own(gloo: Gloo) -> None:
    """It is identical on all workers, and independent between the shards of one worker."""
    first, second, *others = gloo(noisy_shards, 4)
    assert torch.equal(torch.stack(others), torch.stack([first, second]))
    assert float(first.std()) == pytest.approx(1.0, abs=0.15)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 5 / 800**0.5


def fully_sharded(more: dict[str, float]) -> tuple[list[Tensor], list[Tensor], int]:
    from torch.distributed.fsdp import fully_shard

    grid = mesh()
    replica, group = dist.get_rank() // 2, grid["replicate"].get_group()
    plain = network()
    options = {"compressor": WHOLE, "group": group, "mean_momentum": 0.0, **more}
    train(plain, replica, 7, **options)
    model = network()
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=grid["shard"])
    fully_shard(model, mesh=grid["shard"])
    local = train(model, replica, 7, **options)
    return [p.detach().clone() for p in plain.parameters()], whole(model), local.rounds


@pytest.mark.parametrize("more", [{}, {"mean_momentum": 0.5}, {"agreement": 0.5}], ids=lambda m: "".join(m) or "plain")
def test_fsdp2_is_the_unsharded_run(gloo: Gloo, more: dict[str, float]) -> None:
    """2 x 2: replicas exchange their own shards; bit for bit the run of two whole models. With `mean_momentum` and
    agreement, to rounding, since their norms are sums over shards."""
    for plain, sharded, rounds in gloo(fully_sharded, 4, more):
        assert rounds == 2
        for a, b in zip(plain, sharded, strict=True):
            assert torch.equal(a, b) if not more else torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def tensor_parallel(ratio: float) -> tuple[list[Tensor], list[Tensor], bool, int]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    grid = mesh()
    replica, group = dist.get_rank() // 2, grid["replicate"].get_group()
    model = network()
    parallelize_module(model, grid["shard"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    kind = Compression(TopK(ratio), dense_below=1)
    local = train(model, replica, 7, compressor=kind, group=group, fragments=2)
    replicated = [p.to_local().detach().clone() for p in model.parameters() if p.placements[0].is_replicate()]  # type: ignore[attr-defined,operator]
    return whole(model), replicated, bool(local.error().any()), len(local._fragments)


def test_tensor_parallel_shards_stay_one_model(gloo: Gloo) -> None:
    """What is replicated over shards comes out alike on all, though each sends other coordinates of the rest."""
    found = gloo(tensor_parallel, 4, 0.2)
    for model, replicated, has_error, fragments in found:
        assert has_error
        assert replicated
        assert fragments == 3  # the last bias is on both shards
        for a, b in zip(model, found[0][0], strict=True):
            assert torch.equal(a, b) or a.shape == b.shape
        for a, b in zip(replicated, found[0][1], strict=True):
            assert a.shape == b.shape
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))  # shards of one replica


def behind_ddp(switched_off: bool) -> list[Tensor]:
    model = nn.parallel.DistributedDataParallel(network())
    if switched_off:
        keep_gradients_local(model)
    train(model, dist.get_rank(), 7, compressor=WHOLE)
    plain = network()
    train(plain, dist.get_rank(), 7, compressor=WHOLE)
    return [p - q for p, q in zip(model.parameters(), plain.parameters(), strict=True)]


def test_ddp_that_exchanges_nothing(gloo: Gloo) -> None:
    for differences in gloo(behind_ddp, 2, True):
        assert not any(bool(d.any()) for d in differences)


def statistics_behind_ddp() -> list[list[float]]:
    plain = nn.BatchNorm1d(3)
    model = nn.parallel.DistributedDataParallel(nn.BatchNorm1d(3))
    keep_gradients_local(model)
    data = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(3):
        batch = torch.randn(4, 3, generator=data)
        plain(batch)
        model(batch)
    return [plain.running_mean.tolist(), model.module.running_mean.tolist()]


def test_ddp_that_exchanges_no_buffers(gloo: Gloo) -> None:
    """Running statistics are each worker's own, as without DistributedDataParallel."""
    for own, behind in gloo(statistics_behind_ddp, 2):
        assert own == behind


def test_ddp_that_exchanges_is_found(gloo: Gloo) -> None:
    with pytest.raises(AssertionError, match="gradients are equal bit for bit on all 2 workers at the first step"):
        gloo(behind_ddp, 2, False)


def test_a_model_without_ddp_is_left_alone(tmp_path: Path) -> None:
    model = network()
    keep_gradients_local(model)
    train(model, 0, 4, group=Solo(), compressor=WHOLE)
