"""The gradients as error memory: the run of a memory of its own, and a refusal of all that would spoil it."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import problems
import pytest
import torch
from problems import network, vector
from specs import folded
from torch import Tensor, nn

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    CompressedSGD,
    Compression,
    Compressor,
    Escape,
    Identity,
    LinearSketch,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
    simulate,
)

COMPRESSORS = [
    Identity(),
    RandomK(0.5),
    TopK(0.3),
    AdaptiveTopK(0.7),
    SharedTopK(0.3, block_size=2),
    SketchTopK(0.3),
    Sign(),
    QSGD(),
    LinearSketch(0.5),
    LowRank(),
]


def small(memory: Any = "gradient", lr: float = 0.1, **changes: Any) -> tuple[nn.Module, Tensor, CompressedSGD]:
    model, data = network()
    arguments = {"compressor": RandomK(0.1), "dense_below": 100, "seed": 3, "memory": memory, **changes}
    return model, data, CompressedSGD(model.named_parameters(), lr, **folded(arguments))


def backward(model: nn.Module, data: Tensor) -> None:
    (model(data) - data).square().mean().backward()


def train(model: nn.Module, data: Tensor, opt: CompressedSGD, steps: int, each: Callable[[int], None] = int) -> None:
    for step in range(steps):
        if opt.state_dict()["param_groups"][0]["memory"] == "buffer":
            opt.zero_grad()
        backward(model, data)
        opt.step()
        each(step)


@pytest.mark.parametrize(
    ("compressor", "workers", "lazy"),
    [
        *((c, workers, lazy) for c in COMPRESSORS for workers, lazy in ((3, None), (1, False))),
        (RandomK(0.5), 3, False),  # noise is lazy with it alone
        (RandomK(0.5), 1, None),
    ],
    ids=str,
)
def test_the_run_is_that_of_a_memory_of_its_own(compressor: Compressor, workers: int, lazy: bool | None) -> None:
    def work(rank: int) -> list[dict[str, Any]]:
        return [
            problems.run(compressor, steps=20, seed=7, noise=0.1, memory=memory, lazy=lazy, interval=8)
            for memory in ("buffer", "gradient")
        ]

    for own, shared in simulate(work, workers):
        assert own["resets"] == shared["resets"]
        for name in ("x", "e", "y"):
            # Products by eta are rounded at other places; a rounding can change which of two equal values is kept.
            assert torch.allclose(own[name], shared[name], rtol=1e-9, atol=1e-10)
        for run in (own, shared):
            run["bytes"].pop("start")  # where arguments are compared, of which one differs
            run["bytes"].pop("dense", None)  # where the learning rate is compared
        assert own["bytes"] == shared["bytes"]


@pytest.mark.parametrize("compressor", [RandomK(0.1), TopK(0.1)], ids=repr)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_schedules_and_weight_decay(compressor: Compressor, decay: float) -> None:
    """A rate that changes after the step, as schedulers change it, leaves y and gives the same run."""
    runs = []
    for memory in ("buffer", "gradient"):
        model, data, opt = small(memory, compressor=compressor, weight_decay=decay, noise=0.05)
        scheduler = torch.optim.lr_scheduler.StepLR(opt, 7, 0.4)
        train(model, data, opt, 30, lambda _, scheduler=scheduler: scheduler.step())  # type: ignore[misc]
        runs.append((vector(model), opt.error(), opt.corrected()))
    for own, shared in zip(*runs, strict=True):
        assert torch.allclose(own, shared, rtol=1e-8, atol=1e-9)


def test_gradients_accumulate_over_backward_passes() -> None:
    runs = []
    for memory in ("buffer", "gradient"):
        model, data, opt = small(memory)
        for _ in range(5):
            if memory == "buffer":
                opt.zero_grad()
            for half in data.split(8):
                backward(model, half)
            opt.step()
        runs.append(vector(model))
    assert torch.allclose(*runs, rtol=1e-9, atol=1e-10)


def test_there_is_no_second_vector() -> None:
    model, _, opt = small()
    storages = {state["pending"].untyped_storage().data_ptr() for state in opt.state.values()}
    assert storages == {p.grad.untyped_storage().data_ptr() for p in model.parameters()}  # type: ignore[union-attr]
    assert len(storages) == 1


def test_resuming_is_bit_equal() -> None:
    model, data, opt = small(noise=0.1, lr=0.05)
    train(model, data, opt, 7)
    opt.param_groups[0]["lr"] = 0.1  # known to the memory only when the next gradient comes
    saved, weights = copy.deepcopy(opt.state_dict()), copy.deepcopy(model.state_dict())
    train(model, data, opt, 8)
    again, _, resumed = small(noise=0.1)
    again.load_state_dict(weights)
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0].keys() == opt.param_groups[0].keys()
    train(again, data, resumed, 8)
    assert torch.equal(vector(again), vector(model))
    with pytest.raises(ValueError, match="memory is buffer here, but the state was saved with memory gradient"):
        small("buffer", noise=0.1)[2].load_state_dict(saved)


def test_present_gradients_are_taken_over() -> None:
    model, data, _ = small("buffer")
    backward(model, data)
    first = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    CompressedSGD(model.parameters(), 0.1, Compression(RandomK(0.01), memory="gradient", dense_below=0))
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True) if p.grad is not None)


def spoil_none(model: nn.Module) -> None:
    model.zero_grad()


def spoil_zero(model: nn.Module) -> None:
    model.zero_grad(set_to_none=False)


def spoil_clip(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e9)


def spoil_clip_each(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)


def spoil_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.1)


def spoil_one(model: nn.Module) -> None:
    p = next(model.parameters())
    p.grad = torch.zeros_like(p)


@pytest.mark.parametrize("after_backward", [True, False])
@pytest.mark.parametrize("spoil", [spoil_none, spoil_zero, spoil_clip, spoil_clip_each, spoil_value, spoil_one])
def test_what_would_spoil_the_memory_is_refused(spoil: Callable[[nn.Module], None], after_backward: bool) -> None:
    model, data, opt = small()
    train(model, data, opt, 3)
    if after_backward:
        backward(model, data)
        spoil(model)
    else:
        spoil(model)
        backward(model, data)
    x = vector(model)
    with pytest.raises(RuntimeError, match='with memory="gradient" the gradients store the error memory, but'):
        opt.step()
    assert torch.equal(vector(model), x)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_a_graph_of_the_gradient_is_refused() -> None:
    model, data, opt = small()
    (model(data) - data).square().mean().backward(create_graph=True)
    with pytest.raises(RuntimeError, match=r"that of 0\.weight was cleared or replaced"):
        opt.step()
    for p in model.parameters():
        p.grad = None  # the graph holds it, and it the graph


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*")
def test_a_scaler_is_refused(unscale: bool) -> None:
    model, data, opt = small()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale((model(data) - data).square().mean()).backward()
    if unscale:
        scaler.unscale_(opt)
    with pytest.raises(RuntimeError, match="GradScaler"):
        scaler.step(opt)


def test_a_scaler_works_with_a_memory_of_its_own() -> None:
    runs = []
    for scaled in (True, False):
        model, data, opt = small("buffer")
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=256.0)
        for _ in range(5):
            opt.zero_grad()
            scaler.scale((model(data) - data).square().mean()).backward()
            scaler.step(opt)
            scaler.update()
        runs.append(vector(model))
    assert torch.equal(*runs)  # powers of two scale without rounding


def test_zero_grad_is_refused() -> None:
    opt = small()[2]
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) would clear the error memory"):
        opt.zero_grad()


def test_bad_settings_are_named() -> None:
    with pytest.raises(ValueError, match="needs one lr above 0 for all groups, got"):
        small(lr=0.0)
    with pytest.raises(ValueError, match="memory must be \"buffer\" with exchange 'two-way', got 'gradient'"):
        small(compressor=TopK(0.1), exchange="two-way")
    with pytest.raises(ValueError, match="memory must be one of buffer, gradient, ef21, got"):
        small("gradients")
    half = nn.Linear(40, 40).to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs parameters of 32 or 64 bits, got torch\.bfloat16"):
        CompressedSGD(half.parameters(), 0.1, Compression(RandomK(0.01), memory="gradient"))
    a, b = (nn.Parameter(torch.ones(40, 40)) for _ in range(2))
    with pytest.raises(ValueError, match=r"one lr above 0 for all groups, got \[0.1, 0.2\]"):
        CompressedSGD([{"params": [a]}, {"params": [b], "lr": 0.2}], 0.1, Compression(RandomK(0.01), memory="gradient"))


def test_rates_that_part_later_are_refused() -> None:
    a, b = (nn.Parameter(torch.ones(40, 40)) for _ in range(2))
    opt = CompressedSGD([{"params": [a]}, {"params": [b]}], 0.1, Compression(RandomK(0.01), memory="gradient"))
    opt.param_groups[1]["lr"] = 0.2
    with pytest.raises(ValueError, match=r"one lr above 0 for all groups, got \[0.1, 0.2\]"):
        opt.step()


def test_parameters_frozen_and_thawed() -> None:
    """One that is frozen at the start or later stays where it is, and moves again when it is thawed."""
    runs = []
    for memory in ("buffer", "gradient"):
        model, data, _ = small("buffer")
        first = next(model.parameters()).requires_grad_(False)
        opt = CompressedSGD(model.parameters(), 0.1, Compression(RandomK(0.1), dense_below=100, memory=memory), seed=3)
        before = first.detach().clone()
        train(model, data, opt, 3)
        assert torch.equal(first, before)
        first.requires_grad_(True)
        train(model, data, opt, 5)
        assert not torch.equal(first, before)
        runs.append(vector(model))
    assert torch.allclose(*runs, rtol=1e-9, atol=1e-10)


def test_another_optimizer_may_follow() -> None:
    model, data, opt = small()
    train(model, data, opt, 2)
    del opt
    gc.collect()
    following = CompressedSGD(model.parameters(), 0.1, Compression(RandomK(0.01), memory="gradient", dense_below=100))
    train(model, data, following, 3)
    plain = torch.optim.SGD(model.parameters(), 0.1)
    plain.zero_grad()
    backward(model, data)
    plain.step()


def test_the_escape_check_sees_the_pending_update() -> None:
    """Lines 5 to 7 need eta e, which is the gradients times eta."""
    runs = []
    for memory in ("buffer", "gradient"):
        model, data, _ = small("buffer")
        rule = Escape(4, 0.5, lambda model=model, data=data: (model(data) - data).square().mean(), compare="y")  # type: ignore[misc]
        opt = CompressedSGD(model.parameters(), 0.1, Compression(TopK(0.1), dense_below=0, memory=memory), escape=rule)
        train(model, data, opt, 20)
        runs.append((vector(model), torch.tensor([r.candidate for r in opt.resets], dtype=torch.float64)))
    assert len(runs[0][1]) > 1
    for own, shared in zip(*runs, strict=True):
        assert torch.allclose(own, shared, rtol=1e-9, atol=1e-10)


def test_an_optimizer_that_is_done_does_not_disturb_the_next() -> None:
    """Its schedule ended at a rate of 0, and it is still referred to."""
    model, data, opt = small()
    train(model, data, opt, 2)
    opt.param_groups[0]["lr"] = 0.0
    following = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        following.zero_grad()
        backward(model, data)
        following.step()
    with pytest.raises(RuntimeError, match="cleared or replaced"):
        opt.step()


def test_a_rate_of_zero_is_refused_by_the_step_and_not_by_the_backward_pass() -> None:
    model, data, opt = small()
    opt.param_groups[0]["lr"] = 0.0
    backward(model, data)
    with pytest.raises(ValueError, match="one lr above 0"):
        opt.step()
