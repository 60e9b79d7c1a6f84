"""Batch normalisation among workers: against torch's on the joined batch, and the mixture's moments when testing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lab.tasks.models import WorkerBatchNorm2d, average_buffers, connect
from packsaddle import simulate
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.simulation import FusedGroup

W, B, C = 3, 4, 5


def inputs() -> tuple[Tensor, Tensor]:
    """Every worker's batch, one after the other, far apart as those of one class each; and weights of a loss."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(W * B, C, 3, 2, generator=rng, dtype=torch.float64)
    return x + torch.arange(W * B, dtype=torch.float64).div(B, rounding_mode="floor")[:, None, None, None], torch.randn(
        x.shape, generator=rng, dtype=torch.float64
    )


def norm(over: Any) -> WorkerBatchNorm2d:
    module = WorkerBatchNorm2d(C, over).double()
    with torch.no_grad():
        module.weight.copy_(torch.linspace(0.5, 1.5, C))
        module.bias.copy_(torch.linspace(-1, 1, C))
    return module


def torch_norm(x: Tensor) -> tuple[Tensor, nn.BatchNorm2d]:
    twin = nn.BatchNorm2d(C).double()
    with torch.no_grad():
        twin.weight.copy_(torch.linspace(0.5, 1.5, C))
        twin.bias.copy_(torch.linspace(-1, 1, C))
    return twin(x), twin


def one_worker(over: Any) -> dict[str, Any]:
    """This worker's output, gradients of its own loss, running moments and bytes."""
    group = resolve(None)
    x, weights = (t[group.rank * B : (group.rank + 1) * B].clone() for t in inputs())
    x.requires_grad_()
    module, channel = norm(over), Communicator(group, Ledger())
    connect(module, channel)
    y = module(x)
    (y * weights).sum().backward()
    counted = dict(channel.ledger.by_purpose)
    average_buffers(module, channel)
    return {
        "y": y.detach(),
        "x": x.grad,
        "weight": module.weight.grad,
        "bias": module.bias.grad,
        "mean": module.running_mean,
        "square": module.running_square,
        "eval": module.eval()(torch.ones(1, C, 1, 1, dtype=torch.float64)).detach().flatten(),
        "bytes": {name: (b.payload, b.sent) for name, b in counted.items()},
    }


def expected(over: str) -> dict[str, Tensor]:
    """By torch's batch normalisation of the joined batch, or of each worker's."""
    x, weights = inputs()
    x.requires_grad_()
    parts = [x] if over == "all" else list(x.split(B))
    outputs, twins = zip(*map(torch_norm, parts), strict=True)
    (torch.cat(outputs) * weights).sum().backward()
    sums = {name: sum(getattr(twin, name).grad for twin in twins) for name in ("weight", "bias")}
    return {"y": torch.cat(outputs).detach(), "x": x.grad, **sums}  # type: ignore[dict-item]


@pytest.mark.parametrize("over", ["all", "worker"])
@pytest.mark.parametrize("real", [False, True], ids=["simulated", "processes"])
def test_workers_apart_are_torch_s_on_the_joined_batch(gloo: Callable[..., list[Any]], over: str, real: bool) -> None:
    found = gloo(one_worker, W, over) if real else simulate(lambda rank: one_worker(over), W)
    want = expected(over)
    assert torch.allclose(torch.cat([f["y"] for f in found]), want["y"], atol=1e-12)
    # The objective is the mean of the workers' losses: each gradient is W times its share of the sum's.
    assert torch.allclose(torch.cat([f["x"] for f in found]), want["x"], atol=1e-12)
    for name in ("weight", "bias"):
        assert torch.allclose(sum(f[name] for f in found), want[name], atol=1e-12)
    # forward and backward: two moments of every channel, and nothing if each keeps to itself
    once = 2 * C * 8
    bytes_ = {"batch norm": (2 * once, 2 * round(4 / 3 * once))} if over == "all" else {}
    assert all(f["bytes"] == bytes_ for f in found)


@pytest.mark.parametrize("over", ["all", "worker"])
def test_running_moments_are_the_mixture_s(over: str) -> None:
    """After one batch at momentum 0.1: nine tenths of the start's (0, 1), a tenth of the joined batch's moments."""
    x, _ = inputs()
    pixels = x.transpose(0, 1).flatten(1)
    mean, square = 0.1 * pixels.mean(1), 0.9 + 0.1 * pixels.square().mean(1)
    want = (1 - mean) / (square - mean.square() + 1e-5).sqrt() * torch.linspace(0.5, 1.5, C) + torch.linspace(-1, 1, C)
    for found in simulate(lambda rank: one_worker(over), W):
        assert torch.allclose(found["mean"], mean)
        assert torch.allclose(found["square"], square)
        assert torch.allclose(found["eval"], want.double())


def test_fused_is_apart() -> None:
    apart = simulate(lambda rank: one_worker("all"), W)
    x, weights = inputs()
    module, channel = norm("all"), Communicator(FusedGroup(W), Ledger())
    connect(module, channel)
    y = module(x)
    (y * weights).sum().backward()
    assert torch.allclose(y, torch.cat([f["y"] for f in apart]), atol=1e-12)
    assert torch.allclose(module.weight.grad, sum(f["weight"] for f in apart), atol=1e-12)  # type: ignore[arg-type]
    assert {n: (b.payload, b.sent) for n, b in channel.ledger.by_purpose.items()} == apart[0]["bytes"]
    average_buffers(module, channel)
    assert torch.allclose(module.running_mean, apart[0]["mean"])
    assert torch.allclose(module.running_square, apart[0]["square"])
