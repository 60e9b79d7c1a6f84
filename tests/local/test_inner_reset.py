"""A worker whose parameters were not finite: its inner optimizer is reset, also within a wrapper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from specs import local_options
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from packsaddle import Compression, Identity, LocalUpdates, NonFiniteError, Overlap, simulate
from packsaddle.integrations import JoinedOptimizer
from packsaddle.local.after import clear_nonfinite

Make = Callable[[list[Any]], Optimizer]
STEPS, EVERY, BAD = 24, 4, 5  # worker 1 has a batch of NaNs at step 5


class Wrapper(Optimizer):
    """Steps other optimizers, `held` in an attribute or behind a function; it has no state of its own."""

    def __init__(self, members: list[Optimizer], held: object = None) -> None:
        super().__init__([p for m in members for group in m.param_groups for p in group["params"]], {})
        self.held, self.members = held, lambda: members

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        for member in self.members():
            member.step()


def adamw(ps: list[Any]) -> Optimizer:
    return AdamW(ps, lr=0.05)


def held_in(hold: Callable[[list[Optimizer]], object]) -> Make:
    """Of two AdamW, one of each layer."""

    def make(ps: list[Any]) -> Optimizer:
        members = [adamw(ps[:2]), adamw(ps[2:])]
        return Wrapper(members, hold(members))

    return make


KNOWN: dict[str, Make] = {
    "itself": adamw,
    "attribute": lambda ps: Wrapper([one := adamw(ps)], one),
    "list": held_in(list),
    "dict of wrappers": held_in(lambda members: {"a": (Wrapper(members[:1], members[0]),), "b": {"c": members[1]}}),
    "function": held_in(lambda _: None),
    "shared state": lambda ps: JoinedOptimizer([adamw(ps[:2]), adamw(ps[2:])]),
}


def network() -> nn.Sequential:
    net, rng = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2)).double(), torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, generator=rng)
    return net


def backward(net: nn.Module, worker: int, n: int, *, bad: bool) -> None:
    """Of a loss in which a NaN reaches every gradient."""
    rng = torch.Generator().manual_seed(100 * n + worker)
    batch = torch.randn(5, 6, dtype=torch.float64, generator=rng) + (torch.nan if bad else 0.0)
    net.zero_grad()
    net(batch).square().mean().backward()


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def train(worker: int, make: Make, **options: Any) -> tuple[list[Tensor], LocalUpdates]:
    net, seen = network(), []
    optimizer = make(list(net.parameters()))
    whole = Compression(Identity(), dense_below=0)
    given = {"compressor": whole, "keep_unsent": False, "mean_momentum": 0.0} | options
    local = LocalUpdates(optimizer, every=EVERY, **local_options(**given))
    for n in range(1, STEPS + 1):
        backward(net, worker, n, bad=n == BAD and worker == 1)
        optimizer.step()
        seen.append(flat(net))
    return seen, local


def by_hand(make: Make) -> list[list[Tensor]]:
    """Of two workers, x after each step. The optimizer of worker 1 is made anew, for all its moments are NaN."""
    nets = [network(), network()]
    optimizers = [make(list(net.parameters())) for net in nets]
    anchor, seen = flat(nets[0]), [[], []]
    for n in range(1, STEPS + 1):
        for worker, net in enumerate(nets):
            backward(net, worker, n, bad=n == BAD and worker == 1)
            optimizers[worker].step()
        if n % EVERY == 0 and flat(nets[1]).isnan().any():
            nn.utils.vector_to_parameters(anchor.clone(), nets[1].parameters())
            optimizers[1] = make(list(nets[1].parameters()))
        elif n % EVERY == 0:
            anchor = (flat(nets[0]) + flat(nets[1])) / 2
            for net in nets:
                nn.utils.vector_to_parameters(anchor.clone(), net.parameters())
        for worker, net in enumerate(nets):
            seen[worker].append(flat(net))
    return seen


def check(make: Make, expected: list[list[Tensor]]) -> None:
    for (xs, local), ours in zip(simulate(lambda worker: train(worker, make), 2), expected, strict=True):
        assert (local.rounds, local.skipped) == (STEPS // EVERY - 1, 1)
        assert local.skips[0].workers == (1,)
        for n, (x, y) in enumerate(zip(xs, ours, strict=True), start=1):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12, equal_nan=True, msg=f"after step {n}")


@pytest.mark.parametrize("name", KNOWN)
def test_nested_optimizers_are_reset(name: str) -> None:
    """One bad batch costs one round, and the runs of both workers are those of AdamW made anew on worker 1."""
    check(KNOWN[name], by_hand(adamw))


def stays_bad(worker: int) -> tuple[list[int], str]:
    """Train in rounds of two steps, all of whose gradients are NaN on worker 1 after the fourth step. Returns the
    numbers of steps and rounds, applied and rejected, and the error."""
    net = network()
    optimizer = adamw(list(net.parameters()))
    spec = Compression(Identity(), dense_below=0, max_skipped=1)
    local = LocalUpdates(optimizer, every=2, compressor=spec, mean_momentum=0.0)

    def run() -> None:
        for n in range(1, 21):
            backward(net, worker, n, bad=n > 4 and worker == 1)
            optimizer.step()

    with pytest.raises(NonFiniteError) as raised:
        run()
    return [local.steps, local.rounds, local.skipped], str(raised.value)


def test_rounds_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Where a step would be named, of an optimizer that exchanges each of its steps."""
    (counts, error), other = simulate(stays_bad, 2)
    assert other == (counts, error)
    assert counts == [8, 2, 2]
    found = "round 2: the local update of parameter 0 is not finite on worker 1; "
    assert error.startswith(
        found + "2 consecutive rounds rejected, more than max_skipped=1. The anchor and the error memories"
    )
    assert [record.getMessage() for record in caplog.records] == [
        found + "the round is rejected",
        found + "the round is rejected (2 in a row)",
    ]


def test_values_of_groups() -> None:
    """They become the defaults, as of optimizers that estimate their rate; infinite settings stay."""
    x = nn.Parameter(torch.ones(2))
    optimizer = SGD([x], lr=0.5)
    optimizer.defaults |= {"d": 1e-6, "limit": float("inf")}
    norm, d = torch.tensor(float("nan")), torch.tensor(float("inf"))
    optimizer.param_groups[0] |= {"lr": float("nan"), "d": d, "norm": norm, "limit": float("inf")}
    optimizer.state[x] = {"history": [torch.ones(2), torch.tensor([1.0, float("nan")])]}
    clear_nonfinite(optimizer)
    (group,) = optimizer.param_groups
    assert (group["lr"], float(d), float(norm), group["limit"]) == (0.5, pytest.approx(1e-6), 0.0, float("inf"))
    assert group["d"] is d
    assert not optimizer.state


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("bad", [10, 11])
def test_parameters_of_a_running_exchange_go_back_to_its_beginning(bad: int, reads: bool) -> None:
    """Unless they were invalid by then: they go back to the anchor. With `reads`, what is pending was looked at."""

    def run(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        first, second = (torch.nn.Parameter(torch.zeros(8)) for _ in range(2))
        optimizer = torch.optim.SGD([first, second], lr=1.0)
        local = LocalUpdates(optimizer, Identity(), every=4, overlap=Overlap(3, 2), keep_unsent=False)
        begun = torch.zeros(8)
        for n in range(1, 12):  # the second is exchanged after step 10, the first after 8, and applied after 11
            first.grad, second.grad = (torch.full((8,), float(n + 10 * rank)) for _ in range(2))
            if rank == 1 and n in (8, bad):
                (first if n == 8 else second).grad[3] = torch.nan  # type: ignore[index]
            optimizer.step()
            begun = second.detach().clone() if n == 10 else begun
            if n == 10 and reads:
                local.pending()
        assert [skip.workers for skip in local.skips] == [(1,)]
        return second.detach(), begun, local.anchor()["parameter 1"]

    _, (second, begun, anchor) = simulate(run, 2)
    assert torch.equal(second, begun if bad == 11 else anchor)
    assert not torch.equal(second, anchor) or bad == 10
