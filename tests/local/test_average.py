"""`LocalUpdates.average`: what follows each worker's own parameters, made equal on all of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from elastic_fakes import Worker
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from packsaddle import LocalUpdates, Sign, Workers, simulate
from packsaddle.comm import resolve


def network() -> nn.Sequential:
    net, rng = nn.Sequential(nn.Linear(6, 40), nn.BatchNorm1d(40), nn.Linear(40, 40)), torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.3, generator=rng)
    return net


class ScheduleFree(torch.optim.Optimizer):
    """SGD of Defazio et al. (2024), equation 3: parameters are y = (1 - b) z + b x, and x is the mean of all z."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1, "b": 0.9, "k": 0})

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            for y in group["params"]:
                z = self.state[y].setdefault("z", y.clone())
                x = (y - (1 - group["b"]) * z) / group["b"]
                z.sub_(y.grad, alpha=group["lr"])
                x.lerp_(z, 1 / group["k"])
                y.copy_((1 - group["b"]) * z + group["b"] * x)

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            for y in group["params"]:
                y.copy_((y - (1 - group["b"]) * self.state[y]["z"]) / group["b"])


def train(net: nn.Module, optimizer: torch.optim.Optimizer, ema: AveragedModel, steps: int) -> None:
    rng = torch.Generator().manual_seed(resolve(None).rank)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(8, 6, generator=rng)).square().mean().backward()
        optimizer.step()
        ema.update_parameters(net)


def floats(module: nn.Module) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in [*module.parameters(), *module.buffers()]])


def averaged(weight: float | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Averages before and after, and the parameters after."""
    net = network()
    optimizer, ema = (
        torch.optim.SGD(net.parameters(), lr=0.1),
        AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True),
    )
    mine = None if weight is None else weight * (1 + resolve(None).rank)
    local = LocalUpdates(optimizer, Sign(), every=4, workers=Workers(weight=mine))
    train(net, optimizer, ema, 10)
    local.flush()
    before = floats(ema)
    local.average(ema)
    return [before], [floats(ema)], nn.utils.parameters_to_vector(net.parameters()).detach()


@pytest.mark.parametrize("weight", [None, 2.0])
def test_a_moving_average_is_the_mean_of_all_workers(weight: float | None) -> None:
    (first, one, x), (second, two, y) = simulate(lambda _: averaged(weight), 2)
    shares = (0.5, 0.5) if weight is None else (1 / 3, 2 / 3)
    assert not torch.allclose(first[0], second[0])
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[0], shares[0] * first[0] + shares[1] * second[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(x, y)


def test_in_processes(gloo: Callable[..., list[Any]]) -> None:
    (first, one, _), (second, two, _) = gloo(averaged, 2)
    assert torch.equal(one[0], two[0])
    torch.testing.assert_close(one[0], (first[0] + second[0]) / 2, rtol=1e-5, atol=1e-6)


def test_schedule_free_weights_are_equal_after_it() -> None:
    def body(worker: int) -> tuple[Tensor, Tensor]:
        found = []
        for average in (False, True):
            net = network()
            optimizer = ScheduleFree(net.parameters())
            local = LocalUpdates(optimizer, Sign(), every=4)
            train(net, optimizer, AveragedModel(net), 10)
            local.flush()
            if average:
                local.average([state["z"] for state in optimizer.state.values()])
            optimizer.eval()
            found.append(nn.utils.parameters_to_vector(net.parameters()).detach())
        return found[0], found[1]

    (apart, x), (apart_too, y) = simulate(body, 2)
    assert not torch.allclose(apart, apart_too)
    assert torch.equal(x, y)


def test_sixteen_bits_and_integers() -> None:
    def body(worker: int) -> tuple[list[float], int]:
        local = LocalUpdates(torch.optim.SGD(network().parameters(), lr=0.1), Sign())
        half, count = torch.tensor([1.0, 3.0 * worker], dtype=torch.bfloat16), torch.tensor(5 + worker)
        local.average([half, count])
        return half.tolist(), int(count)

    assert simulate(body, 2) == [([1.0, 1.5], 5)] * 2


def test_the_average_of_the_anchor_and_its_state_dict_need_no_exchange() -> None:
    def body(worker: int) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], bool]:
        net = network()
        optimizer, ema = torch.optim.SGD(net.parameters(), lr=0.1), AveragedModel(net)
        local = LocalUpdates(optimizer, Sign(), every=3)
        rng = torch.Generator().manual_seed(worker)
        for _ in range(10):
            optimizer.zero_grad()
            net(torch.randn(8, 6, generator=rng)).square().mean().backward()
            optimizer.step()
            if local.exchanging:
                with local.at_anchor():
                    ema.update_parameters(net)
        before, own = local.ledger.total.sent, nn.utils.parameters_to_vector(net.parameters()).detach().clone()
        saved = local.state_dict_of(net)
        unchanged = torch.equal(own, nn.utils.parameters_to_vector(net.parameters()).detach())
        parameters = nn.utils.parameters_to_vector(ema.parameters()).detach()
        return parameters, saved, local.anchor(), unchanged and local.ledger.total.sent == before

    (ema, saved, anchor, unchanged), (ema_too, saved_too, _, _) = simulate(body, 2)
    assert unchanged
    assert torch.equal(ema, ema_too)
    trained = [name for name, _ in network().named_parameters()]
    for name, a in zip(trained, anchor.values(), strict=True):
        assert torch.equal(saved[name], a)
        assert torch.equal(saved[name], saved_too[name])


def test_a_call_of_one_worker_alone_is_an_error() -> None:
    def body(worker: int) -> None:
        local = LocalUpdates(torch.optim.SGD(network().parameters(), lr=0.1), Sign())
        with pytest.raises(RuntimeError, match=r"worker 0 calls average\(\) .* and worker 1 calls flush\(\)"):
            local.average([torch.zeros(2)]) if worker == 0 else local.flush()

    simulate(body, 2)
    with pytest.raises(RuntimeError, match="average is for a fixed set of workers"):
        Worker().local.average([torch.zeros(2)])


def test_workers_average_tensors_of_the_same_shapes() -> None:
    """Those of one size in another order would be mixed, and those of another size end the process."""
    given: dict[str, Callable[[int], Any]] = {
        r"tensors\[0\]='\[2, 3\] torch.float32' and worker 1 has tensors\[0\]='\[3, 2\]": lambda w: [
            torch.ones(3, 2) if w else torch.ones(2, 3)
        ],
        r"number of tensors=1 and worker 1 has number of tensors=2": lambda w: [torch.ones(4)] * (1 + w),
        r"tensors\[0\]='\[4\] torch.float32' and worker 1 has tensors\[0\]='\[4\] torch.int64'": lambda w: [
            torch.ones(4, dtype=torch.int64 if w else None)
        ],
    }

    def body(worker: int, found: str) -> None:
        local = LocalUpdates(torch.optim.SGD(network().parameters(), lr=0.1), Sign())
        with pytest.raises(ValueError, match=found):
            local.average(given[found](worker))
        with pytest.raises(TypeError, match="tensors must be a module or tensors, and one is of type tuple"):
            local.average(network().named_parameters())  # type: ignore[arg-type]

    for found in given:
        simulate(partial(body, found=found), 2)
