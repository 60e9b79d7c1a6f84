"""The hook between replicas of a sharded model, on four gloo processes: two shards, two replicas."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from packsaddle import QSGD, Compressor, Identity, LowRank, RandomK, TopK, attach, register_fsdp_hook

Gloo = Callable[..., list[Any]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(30, 61), nn.Tanh(), nn.Linear(61, 60), nn.Tanh(), nn.Linear(60, 30)).double()


def sharded(mesh: Any) -> nn.Sequential:
    from torch.distributed.fsdp import fully_shard

    model = network()
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def meshes() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def loss(model: nn.Module, t: int) -> Tensor:
    batch = torch.randn(8, 30, generator=torch.Generator().manual_seed(10 * t + dist.get_rank()), dtype=torch.float64)
    return (model(batch) - batch).square().mean()


def local_shards(model: nn.Module, gradient: bool = False) -> Tensor:
    tensors = [p.grad if gradient else p for p in model.parameters()]
    return torch.cat([t.to_local().reshape(-1) for t in tensors]).detach().clone()  # type: ignore[union-attr]


def beside_native_hsdp() -> tuple[Tensor, Tensor]:
    mesh = meshes()
    native, ours = sharded(mesh), sharded(mesh["shard"])
    hook = register_fsdp_hook(ours, mesh["replicate"].get_group(), Identity())
    for model in (native, ours):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        for t in range(8):
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
    assert hook.steps == 8
    return local_shards(native), local_shards(ours)


def test_uncompressed_it_is_hsdp(gloo: Gloo) -> None:
    for native, ours in gloo(beside_native_hsdp, 4):
        assert torch.allclose(native, ours, rtol=1e-9, atol=1e-12)


def compressed(compressor: Compressor, exchange: str) -> dict[str, Any]:
    """Plain SGD: y = x - eta e moves as it would uncompressed, from the gradients at x."""
    mesh = meshes()
    native, ours = sharded(mesh), sharded(mesh["shard"])
    group = mesh["replicate"].get_group()
    hook = register_fsdp_hook(ours, group, compressor, exchange=exchange)
    optimizer = torch.optim.SGD(ours.parameters(), 0.1)
    start, total = local_shards(ours), torch.zeros_like(local_shards(ours))
    for t in range(10):
        with torch.no_grad():
            for p, q in zip(native.parameters(), ours.parameters(), strict=True):
                p.to_local().copy_(q.to_local())
        native.zero_grad()
        optimizer.zero_grad()
        loss(native, t).backward()
        loss(ours, t).backward()
        total += local_shards(native, gradient=True)
        optimizer.step()
    e = {name: error.clone() for name, error in hook.memory().items()}
    for error in e.values():
        dist.all_reduce(error, group=group)
    # What has not been applied, whatever the order of the parameters in a shard.
    missing = (start - 0.1 * total) - local_shards(ours)
    return {
        "x": local_shards(ours),
        "missing": float(missing.square().sum()),
        "kept": sum(float((0.1 * error / 2).square().sum()) for error in e.values()),
        "sums": (float(missing.sum()), -0.1 * sum(float(error.sum()) / 2 for error in e.values())),
        "share": sum(b.payload for k, b in hook.ledger.by_purpose.items() if k != "start") / (10 * 8 * len(start)),
        "state": hook.state_dict(),
    }


CASES = [(TopK(0.05), "direct"), (RandomK(0.1), "direct"), (QSGD(), "direct"), (TopK(0.05), "two-way")]


@pytest.mark.parametrize(("compressor", "exchange"), CASES, ids=lambda c: str(c).split("(")[0])
def test_compressed_it_keeps_what_it_does_not_send(gloo: Gloo, compressor: Compressor, exchange: str) -> None:
    runs = gloo(compressed, 4, compressor, exchange)
    for rank, run in enumerate(runs):
        assert torch.equal(run["x"], runs[(rank + 2) % 4]["x"])  # replicas agree bit for bit
        assert run["kept"] > 0
        assert run["missing"] == pytest.approx(run["kept"], rel=1e-9)
        assert run["sums"][0] == pytest.approx(run["sums"][1], rel=1e-9)
        assert run["share"] < 0.3


def resumed() -> list[Tensor]:
    found = []
    for stop in (None, 5):
        mesh = meshes()
        model = sharded(mesh["shard"])
        hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.05), noise=0.01, start_step=2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for t in range(9):
            if t == stop:
                state = hook.state_dict()
                hook = register_fsdp_hook(model, mesh["replicate"].get_group(), TopK(0.05), noise=0.01, start_step=2)
                hook.load_state_dict(state)
            optimizer.zero_grad()
            loss(model, t).backward()
            optimizer.step()
        found.append(local_shards(model))
    return found


def test_a_loaded_state_goes_on_as_before(gloo: Gloo) -> None:
    for whole, again in gloo(resumed, 4):
        assert torch.equal(whole, again)


def refusals() -> list[str]:
    mesh, found = meshes(), []
    group = mesh["replicate"].get_group()
    attempts: list[Callable[[], object]] = [
        lambda: register_fsdp_hook(network(), group),
        lambda: register_fsdp_hook(sharded(mesh), group),
        lambda: register_fsdp_hook(sharded(mesh["shard"]), group, LowRank(1)),
        lambda: register_fsdp_hook(sharded(mesh["shard"]), group, TopK(0.1, per_tensor=True)),
        lambda: attach(sharded(mesh["shard"]), TopK(0.1)),
    ]
    for attempt in attempts:
        try:
            attempt()
            found.append("nothing was raised")
        except (TypeError, ValueError) as error:
            found.append(str(error))
    return found


def test_what_is_refused(gloo: Gloo) -> None:
    for messages in gloo(refusals, 4):
        for message, part in zip(
            messages,
            (
                "model must have been sharded by fully_shard, got Sequential",
                "must be sharded on a mesh of one dimension, got 2",
                "compressor must act on flat shards",
                "compressor must act on flat shards",
                "see packsaddle.register_fsdp_hook",
            ),
            strict=True,
        ):
            assert part in message
