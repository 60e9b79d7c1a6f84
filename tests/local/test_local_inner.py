"""What may be inside local updates: torch's optimizers, parameters of all kinds, scalers, accumulation, compilation."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from local_updates import gradient
from specs import local_options
from torch import Tensor, nn

from packsaddle import Compression, Identity, LocalUpdates, LowRank, TopK, simulate
from packsaddle.comm import resolve

WHOLE = Compression(Identity(), dense_below=0)


class Clipped(torch.optim.AdamW):
    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], 1.0)
        return super().step(closure)


OPTIMIZERS: dict[str, Callable[[list[Any]], torch.optim.Optimizer]] = {
    "SGD momentum": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9),
    "AdamW": lambda ps: torch.optim.AdamW(ps, lr=0.05),
    "AdamW foreach": lambda ps: torch.optim.AdamW(ps, lr=0.05, foreach=True),
    "AdamW fused": lambda ps: torch.optim.AdamW(ps, lr=0.05, fused=True),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, lr=0.05),
    "RAdam": lambda ps: torch.optim.RAdam(ps, lr=0.05),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05),
    "ASGD": lambda ps: torch.optim.ASGD(ps, lr=0.05),
    "a subclass of AdamW": lambda ps: (torch.optim.AdamW(ps), Clipped(ps, lr=0.05))[1],  # torch wraps both steps
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda ps: torch.optim.Muon(ps, lr=0.05)


def matrices(dtype: torch.dtype = torch.float32) -> list[Any]:
    rng = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in ((6, 8), (8, 3))]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name: str) -> None:
    """Against the same optimizer alone, whose parameters are averaged by hand every 3 steps."""

    def body(worker: int) -> list[list[Tensor]]:
        seen = []
        for exchanges in (True, False):
            ps = matrices()
            optimizer = OPTIMIZERS[name](ps)
            if exchanges:
                LocalUpdates(optimizer, every=3, compressor=WHOLE, mean_momentum=0.0)
            for n in range(1, 10):
                for i, p in enumerate(ps):
                    p.grad = gradient(f"{i}", p.detach(), worker, n)
                optimizer.step()
                if not exchanges and n % 3 == 0:
                    group = resolve(None)
                    for p in ps:
                        total = p.detach().double()
                        group.all_reduce(total)
                        p.data.copy_(total / group.size)
            seen.append([p.detach().clone() for p in ps])
        return seen

    for ours, by_hand in simulate(body, 2):
        for a, b in zip(ours, by_hand, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("make", [partial(torch.optim.SGD, lr=0.1), partial(torch.optim.SparseAdam, lr=0.1)])
def test_sparse_gradients(make: Callable[[list[Any]], torch.optim.Optimizer]) -> None:
    """Against the same embeddings and optimizer alone, averaged by hand after 3 steps."""

    def body(worker: int) -> tuple[Tensor, Tensor]:
        nets = [nn.Embedding(40, 4, sparse=True) for _ in range(2)]
        rng, optimizers = torch.Generator().manual_seed(worker), [make([net.weight]) for net in nets]
        with torch.no_grad():
            for net in nets:
                net.weight.copy_(torch.linspace(-1, 1, 160).view(40, 4))
        LocalUpdates(optimizers[0], every=3, compressor=WHOLE)
        for _ in range(3):
            rows = torch.randint(40, (8,), generator=rng)
            for net, optimizer in zip(nets, optimizers, strict=True):
                optimizer.zero_grad()
                net(rows).square().sum().backward()
                assert net.weight.grad is not None
                assert net.weight.grad.is_sparse
                optimizer.step()
        return nets[0].weight.detach(), nets[1].weight.detach()

    (x, first), (y, second) = simulate(body, 2)
    assert torch.equal(x, y)
    torch.testing.assert_close(x, (first + second) / 2)
    assert not torch.equal(first, second)


def test_schedules_and_accumulation() -> None:
    """Rounds come every `every` optimizer steps, not backward passes."""
    net = nn.Linear(6, 8)
    optimizer = torch.optim.AdamW([{"params": net.weight, "lr": 0.01}, {"params": net.bias, "weight_decay": 0.3}])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)
    local, rounds = LocalUpdates(optimizer, every=2, compressor=WHOLE), []
    for n in range(12):
        net(torch.ones(5, 6)).square().mean().backward()
        if n % 2:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        rounds.append(local.rounds)
    assert rounds == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.0001])


def drifts(worker: int, dtype: torch.dtype, steps: int, *, keep: bool, **options: Any) -> list[float]:
    """Train; return by how much y = a - error() is off where training began plus the mean of all inner changes of x.

    What the optimizer has moved x by is read around each of its steps, in float64, before an exchange.
    """
    xs = [nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)) for shape in SHAPES_16]
    optimizer = torch.optim.SGD(xs, lr=0.05, momentum=0.8)
    optimizer.register_step_post_hook(lambda *_: at.copy_(flat()))
    kind = Compression(TopK(0.2), dense_below=1)
    local = LocalUpdates(optimizer, every=4, **local_options(compressor=kind, keep_unsent=keep, **options))

    def flat() -> Tensor:
        return torch.cat([x.detach().double().reshape(-1) for x in xs])

    def drift() -> float:
        y = torch.cat([a.double().reshape(-1) for a in local.anchor().values()]) - local.error()
        mean = moved.clone()
        resolve(None).all_reduce(mean)
        return float((y - start - mean / 2).abs().max())

    at, start, moved, found = flat(), flat(), torch.zeros_like(flat()), list[float]()
    for n in range(1, steps + 1):
        for i, x in enumerate(xs):
            x.grad = gradient(f"{i}", x.detach(), worker, n)
        last = flat()
        optimizer.step()
        moved += at - last
        if n % 23 == 0 or n == steps:
            found.append(drift())
            local.load_state_dict(local.state_dict())  # which has the rounding errors
    assert local.flush(Identity())
    found.append(drift())
    return found


SHAPES_16 = [(9, 7), (5,), (4, 6)]
RUNS_16: dict[str, dict[str, Any]] = {
    "at once": {},
    "delay": {"delay": 2},
    "fragments": {"fragments": 3, "delay": 3},
    "two fragments": {"fragments": 2, "delay": 1},
    "clip": {"clip": 1.0},
}


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.bfloat16) for name in RUNS_16), ("delay", torch.float16)])
def test_16_bit_parameters_lose_no_rounding(name: str, dtype: torch.dtype, keep: bool) -> None:
    """y moves by the mean of what inner optimizers move x by, though x is rounded where an exchange lands."""
    # Of sums of 16-bit numbers around 1, most of which float32 has exactly. One lost rounding is a hundred times that.
    bound = 16 * torch.finfo(torch.float32).eps
    for found in simulate(lambda worker: drifts(worker, dtype, 48, keep=keep, **RUNS_16[name]), 2):
        assert max(found) < bound, found


def test_mixed_precisions_tied_and_frozen_parameters() -> None:
    def body(worker: int) -> dict[str, Tensor]:
        net = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4).to(torch.bfloat16), "c": nn.Linear(4, 4)})
        net["c"].weight = net["a"].weight  # tied
        net["c"].bias.requires_grad_(False)
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(0.25)
        optimizer = torch.optim.SGD(net.named_parameters(), lr=0.5)
        local = LocalUpdates(optimizer, every=1, compressor=WHOLE, noise=0.1)
        assert list(local.anchor()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
        for _, p in net.named_parameters():
            if p.requires_grad:
                p.grad = torch.full_like(p, 1.0 + worker)
        net["b"].bias.requires_grad_(False)  # frozen on the way: without a gradient from then on
        net["b"].bias.grad = None
        optimizer.step()
        return {name: p.detach().clone() for name, p in net.named_parameters()}

    one, two = simulate(body, 2)
    for name, p in one.items():
        assert torch.equal(p, two[name])
    assert not torch.equal(one["a.weight"], torch.full((4, 4), -0.5))  # noise
    torch.testing.assert_close(one["a.weight"].mean(), torch.tensor(-0.5), atol=0.15, rtol=0)
    assert bool((one["b.bias"] == 0.25).all())
    assert bool((one["c.bias"] == 0.25).all())


def test_rounds_in_autocast_lose_no_update() -> None:
    """LowRank multiplies matrices, which autocast would do in bfloat16."""

    def body(worker: int) -> tuple[Tensor, Tensor, Tensor]:
        weight = nn.Parameter(torch.zeros(64, 64))
        local = LocalUpdates(torch.optim.SGD([weight], lr=1.0), compressor=LowRank(4), every=2)
        moved = torch.zeros(64, 64)
        for step in range(6):
            weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(10 * step + worker))
            moved -= weight.grad
            with torch.autocast("cpu", torch.bfloat16):
                local.optimizers[0].step()
        return moved, local.anchor()["parameter 0"], local.error()

    (first, anchor, error), (second, *_) = simulate(body, 2)
    torch.testing.assert_close(anchor.flatten() - error, (first + second).flatten() / 2, rtol=0, atol=1e-5)


def test_closures() -> None:
    x = nn.Parameter(torch.ones(4, 4))
    optimizer = torch.optim.SGD([x], lr=0.1)
    local = LocalUpdates(optimizer, every=2, compressor=WHOLE)

    def closure() -> float:
        x.grad = torch.ones_like(x)
        return 3.0

    assert [optimizer.step(closure) for _ in range(4)] == [3.0] * 4
    assert local.rounds == 2
    torch.testing.assert_close(x.detach(), torch.full((4, 4), 0.6))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_step_is_counted() -> None:
    x = nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.AdamW([x], lr=0.1)
    local = LocalUpdates(optimizer, every=2, compressor=WHOLE)
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(4):
        x.grad = torch.ones_like(x)
        step()
    assert (local.steps, local.rounds) == (4, 2)
