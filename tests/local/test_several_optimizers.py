"""Several optimizers within one exchange, Muon of matrices and AdamW of the rest: one step is a step of each."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from elastic_fakes import FakeGroup, FakeManager
from local_updates import gradient
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import SGD, AdamW, Muon, Optimizer

from packsaddle import Compression, Elastic, Identity, LocalUpdates, simulate
from packsaddle.comm import Solo, resolve

WHOLE = Compression(Identity(), dense_below=0)


def network() -> nn.Sequential:
    net, rng = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.5, generator=rng)
    return net


def muon_and_adamw(net: nn.Module) -> tuple[Optimizer, Optimizer]:
    matrices, vectors = ([p for p in net.parameters() if (p.ndim == 2) is two] for two in (True, False))
    return Muon(matrices, lr=0.02, adjust_lr_fn="match_rms_adamw"), AdamW(vectors, lr=0.05)


def set_gradients(net: nn.Module, worker: int, n: int) -> None:
    for name, p in net.named_parameters():
        p.grad = gradient(name, p.detach(), worker, n)


def flat(net: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(net.parameters()).detach().clone()


def average(net: nn.Module) -> None:
    """Set the parameters to their means over workers; collective."""
    group = resolve(None)
    for p in net.parameters():
        total = p.detach().double()
        group.all_reduce(total)
        p.data.copy_(total / group.size)


def scaled_step(scaler: torch.amp.GradScaler, net: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Step on one batch: those optimizers through the scaler that have a gradient, and the others alone."""
    net.zero_grad()
    scaler.scale(net(torch.ones(3, 6)).square().mean()).backward()
    for optimizer in optimizers:
        ps = optimizer.param_groups[0]["params"]
        scaler.step(optimizer) if any(p.grad is not None for p in ps) else optimizer.step()
    scaler.update()


# ---- whole runs


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("bad", ["", "matrix", "vector"])
def test_against_averages_by_hand(bad: str, order: tuple[int, int]) -> None:
    """Every 3 steps of both, whichever steps first. After a NaN in one, the round is rejected, that optimizer begins
    anew on that worker, and the other keeps its state."""

    def body(worker: int) -> tuple[Tensor, Tensor, list[tuple[int, ...]]]:
        nets = [network(), network()]
        pairs = [list(muon_and_adamw(net)) for net in nets]
        local = LocalUpdates(pairs[0], every=3, compressor=WHOLE, keep_unsent=False)
        for n in range(1, 10):
            for net, pair in zip(nets, pairs, strict=True):
                set_gradients(net, worker, n)
                for p in net.parameters():
                    if n == 2 and worker == 1 and bad == ("matrix" if p.ndim == 2 else "vector"):
                        p.grad = torch.full_like(p, torch.nan)
                for i in order:
                    pair[i].step()
            # By hand: worker 1 goes back to the start, with one optimizer made anew; worker 0 keeps its progress.
            if n == 3 and worker == 1 and bad:
                nets[1].load_state_dict(network().state_dict())
                which = 0 if bad == "matrix" else 1
                pairs[1][which] = muon_and_adamw(nets[1])[which]
            elif n % 3 == 0 and not (bad and n == 3):
                average(nets[1])
        return flat(nets[0]), flat(nets[1]), [skip.workers for skip in local.skips]

    for ours, by_hand, skips in simulate(body, 2):
        assert skips == ([(1,)] if bad else [])
        torch.testing.assert_close(ours, by_hand, rtol=1e-4, atol=1e-5)


# ---- steps that count, and steps that do not


def test_a_scaler_skips_one_optimizer_on_one_worker() -> None:
    """A gradient of AdamW's alone is infinite: Muon steps, AdamW does not, and the step counts on both workers."""

    def body(worker: int) -> tuple[int, int, float, float]:
        a, b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3))
        first, second = SGD([a], lr=0.125), SGD([b], lr=0.125)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        local = LocalUpdates([first, second], every=4, compressor=WHOLE, scaler=scaler)
        for n in range(8):
            a.grad = b.grad = None
            bad = float("inf") if worker == 1 and n == 2 else 1.0
            scaler.scale((worker + 1) * (a.sum() + bad * b.sum())).backward()
            scaler.step(first)
            scaler.step(second)
            scaler.update()
        return local.steps, local.rounds, float(a.detach()[0, 0]), float(b.detach()[0])

    assert simulate(body, 2) == [(8, 2, 1 - 0.125 * (8 + 8 * 2) / 2, 1 - 0.125 * (8 + 7 * 2) / 2)] * 2


def test_a_frozen_optimizer_steps_without_the_scaler() -> None:
    """torch's scaler refuses an optimizer without gradients; its own step counts in place of the scaler's."""
    net, scaler = network(), torch.amp.GradScaler("cpu")
    pair = muon_and_adamw(net)
    local = LocalUpdates(pair, every=2, compressor=WHOLE, scaler=scaler)
    net[0].weight.requires_grad_(False)
    net[2].weight.requires_grad_(False)
    for _ in range(4):
        scaled_step(scaler, net, pair)
    assert (local.steps, local.rounds) == (4, 2)


def test_elastic_optimizers_join_in_their_first_step_with_a_scaler() -> None:
    """The first optimizer joins, and discards the gradients of both, without which the scaler refuses the second."""
    net, manager, scaler = network(), FakeManager(Solo()), torch.amp.GradScaler("cpu")
    pair = muon_and_adamw(net)
    workers = Elastic(manager, group=FakeGroup(manager), leave_on_sigterm=False)
    local = LocalUpdates(pair, every=2, compressor=WHOLE, scaler=scaler, workers=workers, model=net)
    start = flat(net)
    for n in range(4):
        net.zero_grad()
        scaler.scale(net(torch.ones(3, 6)).square().mean()).backward()
        for optimizer in pair:
            scaler.step(optimizer)
        scaler.update()
        assert torch.equal(flat(net), start) == (n == 0)
    assert (local.steps, local.rounds) == (4, 2)


@pytest.mark.parametrize("scaled", [False, True])
def test_states_that_torch_loads_before_the_first_step(scaled: bool) -> None:
    """set_state_dict makes the optimizers' states by a step each, which is not the first one."""
    trained = network()
    pair = muon_and_adamw(trained)
    set_gradients(trained, 0, 1)
    for optimizer in pair:
        optimizer.step()
    weights, states = get_state_dict(trained, pair)

    def body(worker: int) -> None:
        net = network()
        optimizers = muon_and_adamw(net)
        scaler = torch.amp.GradScaler("cpu") if scaled else None
        local = LocalUpdates(optimizers, every=2, compressor=WHOLE, model=net, scaler=scaler)
        set_state_dict(net, optimizers, model_state_dict=weights, optim_state_dict=copy.deepcopy(states))
        assert local.steps == 0
        for name, value in local.anchor().items():
            assert torch.equal(value, weights[name])

    simulate(body, 2)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_first_step_at_rate_zero_counts(order: tuple[int, int]) -> None:
    """Although nothing moves: a warm-up from 0, and an output layer of zeros, behind which gradients are zero."""
    net = network()
    nn.init.zeros_(net[2].weight)
    pair = Muon([net[0].weight], lr=0.02), AdamW([net[0].bias, *net[2].parameters()], lr=0.05)
    optimizers = [pair[i] for i in order]
    local = LocalUpdates(optimizers, every=4, compressor=WHOLE)
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    for n in range(8):
        for group, rate in zip((g for o in optimizers for g in o.param_groups), rates, strict=True):
            group["lr"] = rate * min(1.0, n / 4)
        net.zero_grad()
        net(torch.ones(3, 6)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert (local.steps, local.rounds) == (8, 2)
    assert local.flush()


def test_a_first_step_that_torch_might_have_made_counts_on_no_worker() -> None:
    """Whatever its gradients are, which may be zero on one worker alone."""

    def body(worker: int) -> tuple[int, int]:
        net = network()
        optimizer = AdamW(net.parameters(), lr=0.0)
        local = LocalUpdates(optimizer, every=2, compressor=WHOLE)
        for p in net.parameters():
            p.grad = torch.full_like(p, float(worker))
        optimizer.step(closure=None)
        first = local.steps
        optimizer.step(closure=None)
        return first, local.steps

    assert simulate(body, 2) == [(0, 1)] * 2


def test_a_state_that_torch_saves_between_two_steps() -> None:
    """get_state_dict makes a step of an optimizer that has no state, such as SGD: it does not count."""
    net = network()
    optimizer = SGD(net.parameters(), lr=0.1)
    local = LocalUpdates(optimizer, every=2, compressor=WHOLE)
    for n in range(1, 4):
        set_gradients(net, 0, n)
        optimizer.step()
        optimizer.zero_grad()
        get_state_dict(net, optimizer)
    assert (local.steps, local.rounds) == (3, 1)


# ---- misuses


def step_one_twice(net: nn.Module, pair: tuple[Optimizer, Optimizer]) -> None:
    LocalUpdates(pair, compressor=WHOLE)
    pair[0].step()
    pair[0].step()


def end_within_a_step(call: str, net: nn.Module, pair: tuple[Optimizer, Optimizer]) -> None:
    """The first one may also have been skipped by a scaler that was not given."""
    local = LocalUpdates(pair, compressor=WHOLE)
    pair[1].step()
    getattr(local, call)()


def one_beside_the_scaler(first: int, net: nn.Module, pair: tuple[Optimizer, Optimizer]) -> None:
    """One steps through the scaler, and then the other one by itself."""
    scaler = torch.amp.GradScaler("cpu")
    LocalUpdates(pair, compressor=WHOLE, scaler=scaler)
    scaler.scale(net(torch.ones(3, 6)).sum()).backward()
    scaler.step(pair[first])
    pair[1 - first].step()
    pair[1 - first].step()


MISUSES: list[tuple[Callable[[Any, Any], object], str]] = [
    (step_one_twice, r"Muon has stepped twice and AdamW not: a step counts when all .*, and pass scaler="),
    (lambda *given: one_beside_the_scaler(0, *given), r"AdamW steps without the GradScaler given as scaler"),
    (lambda *given: one_beside_the_scaler(1, *given), r"^Muon steps without the GradScaler given as scaler: call scal"),
    (
        lambda *given: end_within_a_step("flush", *given),
        r"flush\(\) must come between two steps, and Muon has still to .* own; if a GradScaler has skipped it, pass",
    ),
    (
        lambda *given: end_within_a_step("state_dict", *given),
        r"state_dict\(\) must come between two steps, and Muon has still to",
    ),
]


@pytest.mark.parametrize(("misuse", "message"), MISUSES)
def test_misuses(misuse: Callable[[Any, Any], object], message: str) -> None:
    def body(worker: int) -> None:
        net = network()
        with pytest.raises(RuntimeError, match=message):
            misuse(net, muon_and_adamw(net))

    simulate(body, 2)


@pytest.mark.parametrize("named", ["by the model", "by one optimizer", "by none"])
def test_parameters_have_the_models_names(named: str) -> None:
    net = network()
    inside = nn.ModuleDict({"module": net})  # as DistributedDataParallel names it
    pair = muon_and_adamw(net)
    if named == "by one optimizer":
        others = [(f"of its own {i}", p) for i, p in enumerate(pair[1].param_groups[0]["params"])]
        pair = pair[0], AdamW(others)
    local = LocalUpdates(list(pair), compressor=WHOLE, model=None if named == "by none" else inside)
    expected = {id(p): name for name, p in net.named_parameters()}
    order = [id(p) for optimizer in pair for p in optimizer.param_groups[0]["params"]]
    numbered = [f"parameter {i}" for i in range(len(order))]
    assert list(local.anchor()) == (numbered if named == "by none" else [expected[i] for i in order])
