"""The hook and gradients that are not finite: with `optimizer=`, without a scaler, no optimizer is spoilt by them."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ddp_runs import SEVERAL, batches, network, train, vector, wrapped

from packsaddle import Compression, TopK, register_ddp_hook
from packsaddle.comm.group import resolve
from packsaddle.feedback.guard import Skip, Skips

Gloo = Callable[..., list[Any]]


def gives_up() -> tuple[str, bool]:
    model = wrapped(network(torch.float32), SEVERAL)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    register_ddp_hook(model, Compression(TopK(0.05), dense_below=100, max_skipped=2))
    train(model, optimizer, batches(2, torch.float32))
    before, message = vector(model), ""
    try:
        train(model, optimizer, [poisoned()] * 9)
    except RuntimeError as error:
        message = str(error)
    return message, torch.equal(before, vector(model))


def poisoned() -> torch.Tensor:
    """A batch that is NaN on worker 1."""
    return batches(1, torch.float32)[0] * (math.nan if resolve(None).rank == 1 else 1.0)


def test_without_an_optimizer_nothing_is_promised(gloo: Gloo, caplog: pytest.LogCaptureFixture) -> None:
    """An optimizer that the hook does not know of has stepped by the NaNs."""
    for message, same in gloo(gives_up, 2):
        assert "parameters" not in message
        assert "the optimizer steps by NaNs: call hook.protect(optimizer)" in message
        assert not same
    with caplog.at_level("WARNING", "packsaddle"):
        skips = Skips(3, 0, protected=False)
        skips.record(Skip(5, (0,), "0.weight"))
        skips.protected = True
        skips.record(Skip(5, (0,), "0.weight"))
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("step 5: 0.weight is not finite on worker 0; unless a GradScaler")
    assert second.endswith("(2 in a row)")


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another that has called no constructor, as Accelerate's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def in_a_wrapper() -> bool:
    model = wrapped(network(torch.float32), SEVERAL)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    register_ddp_hook(model, Compression(TopK(0.05), dense_below=100), optimizer=Wrapper(Wrapper(optimizer)))
    before = vector(model)
    train(model, optimizer, [batches(1, torch.float32)[0] * math.nan])
    return torch.equal(before, vector(model))


def test_the_optimizer_in_a_frameworks_is_the_one_that_is_kept(gloo: Gloo) -> None:
    assert gloo(in_a_wrapper, 2) == [True] * 2


def shared_optimizer() -> tuple[bool, bool, bool]:
    """Of two models with one optimizer, one has a bad pass, and then rests: whether the other moves, in that step and
    in the next ones; and whether two optimizers of a model both leave the bad step out."""
    models = [wrapped(network(torch.float32), SEVERAL) for _ in range(2)]
    optimizer = torch.optim.SGD([p for m in models for p in m.parameters()], 0.1)
    hooks = [register_ddp_hook(m, TopK(0.05), optimizer=optimizer) for m in models]
    other = torch.optim.SGD(models[0].parameters(), 0.1)
    hooks[0].protect(other)
    first = vector(models[0])
    train(models[0], optimizer, [poisoned()])
    other.step()
    stayed = torch.equal(first, vector(models[0]))
    before = vector(models[1])
    train(models[1], optimizer, batches(3, torch.float32))
    return stayed, not torch.equal(before, vector(models[1])), hooks[1].steps == 3


def test_a_bad_pass_holds_back_one_step_of_each_optimizer(gloo: Gloo) -> None:
    assert gloo(shared_optimizer, 2) == [(True, True, True)] * 2


def two_optimizers() -> tuple[bool, bool]:
    """Of Muon and AdamW behind one hook: whether a bad step moves nothing, and a good one all."""
    model = wrapped(network(torch.float32), SEVERAL)
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 2) is two] for two in (True, False))
    pair = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(vectors, lr=0.1)]
    register_ddp_hook(model, TopK(0.05), optimizer=pair)
    start, moved = vector(model), []
    for data in (poisoned(), batches(1, torch.float32)[0]):
        model(data).square().mean().backward()
        for optimizer in pair:
            optimizer.step()
        model.zero_grad()
        moved.append(vector(model) != start)
    return not bool(moved[0].any()), bool(moved[1].float().mean() > 0.9)


def test_a_bad_pass_holds_back_all_optimizers_of_a_list(gloo: Gloo) -> None:
    assert gloo(two_optimizers, 2) == [(True, True)] * 2
