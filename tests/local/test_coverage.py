"""Parameters that another optimizer trains, and that no exchange has: an error."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from packsaddle import Compression, Identity, LocalUpdates, keep_gradients_local, simulate
from packsaddle.comm.group import resolve

WHOLE = Compression(Identity(), dense_below=0)


class Pair(nn.Module):
    """Two parts, each of which may have an optimizer; `loss` is of both."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 5)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape) * (i + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).tanh())


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


def train(net: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, worker: int) -> None:
    rng = torch.Generator().manual_seed(worker)
    for _ in range(steps):
        net(torch.randn(4, 6, generator=rng)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()


@pytest.mark.parametrize("steps", [1, 4], ids=["flush", "step"])
def test_another_optimizer_of_the_model_is_noticed(steps: int) -> None:
    """After the step in which it first stepped, or by a flush; the parameters are those that come to differ."""

    def body(worker: int) -> tuple[list[str], int]:
        net = Pair()
        optimizers = [sgd(net.body), sgd(net.head)]
        local = LocalUpdates(optimizers[0], every=4, compressor=WHOLE)

        def run() -> None:
            train(net, optimizers, steps, worker)
            local.flush()

        with pytest.raises(RuntimeError, match=r"SGD trains .* does not exchange: head\.weight, head\.bias\."):
            run()
        group = resolve(None)
        everywhere = {name: group.all_gather(p.detach()) for name, p in net.head.named_parameters()}
        return [name for name, (one, other) in everywhere.items() if not torch.equal(one, other)], local.rounds

    assert simulate(body, 2) == [(["weight", "bias"], 0)] * 2


def one_optimizer(net: Pair) -> list[torch.optim.Optimizer]:
    """Gradients of `body` come, and no one steps by them."""
    return [sgd(net.head)]


def frozen(net: Pair) -> list[torch.optim.Optimizer]:
    net.body.requires_grad_(False)
    return [sgd(net.head), sgd(net.body)]


def a_model_of_its_own(net: Pair) -> list[torch.optim.Optimizer]:
    other = Pair()
    for p in other.parameters():
        p.grad = torch.ones_like(p)
    return [sgd(net), sgd(other)]


def one_exchange_each(net: Pair) -> list[torch.optim.Optimizer]:
    """As of a generator and a discriminator."""
    found = [sgd(net.body), sgd(net.head)]
    LocalUpdates(found[1], every=4, compressor=WHOLE)
    return found


@pytest.mark.parametrize("make", [one_optimizer, frozen, a_model_of_its_own, one_exchange_each])
def test_no_error(make: Callable[[Pair], list[torch.optim.Optimizer]]) -> None:
    def body(worker: int) -> bool:
        net = Pair()
        optimizers = make(net)
        local = LocalUpdates(optimizers[0], every=4, compressor=WHOLE)
        train(net, optimizers, 6, worker)
        return local.flush()

    assert simulate(body, 2) == [True, True]
    gc.collect()


def behind_ddp(local: bool) -> str:
    """The head's gradients are averaged by a DistributedDataParallel of its own, or left alone by it."""
    worker, net = torch.distributed.get_rank(), Pair()
    net.head = nn.parallel.DistributedDataParallel(net.head)
    if local:
        keep_gradients_local(net)
    optimizers = [sgd(net.body), sgd(net.head)]
    LocalUpdates(optimizers[0], every=4, compressor=WHOLE)
    try:
        train(net, optimizers, 4, worker)
    except RuntimeError as error:
        return str(error)
    return ""


def test_averaged_gradients_are_an_exchange(gloo: Callable[..., list[Any]]) -> None:
    assert gloo(behind_ddp, 2, False) == ["", ""]
    for said in gloo(behind_ddp, 2, True):
        assert "does not exchange: head.module.weight, head.module.bias" in said
