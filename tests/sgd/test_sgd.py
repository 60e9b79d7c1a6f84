"""CompressedSGD as a torch optimizer: state, schedulers, groups, closures, dense tensors, refusals."""

import copy
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from problems import feed, lone, network, vector
from specs import folded
from torch import nn

import packsaddle as ps
from packsaddle.comm import Solo
from packsaddle.compressors import compressors
from packsaddle.feedback.state import FORMAT


def train(model: nn.Module, data: torch.Tensor, opt: ps.CompressedSGD, steps: int, scheduler: Any = None) -> None:
    for _ in range(steps):
        opt.zero_grad()
        (model(data) - data).square().mean().backward()
        opt.step()
        if scheduler:
            scheduler.step()


def make(model: nn.Module, data: torch.Tensor, **changes: Any) -> ps.CompressedSGD:
    arguments: dict[str, Any] = {
        "compressor": ps.RandomK(0.1),
        "noise": ps.Ramp(0.1, 5, 20),
        "escape": ps.Escape(4, 0.5, lambda: (model(data) - data).square().mean()),
        "dense_below": 100,
        "seed": 3,
    }
    return ps.CompressedSGD(model.named_parameters(), 0.1, **folded({**arguments, **changes}))


def test_the_compressor_may_follow_the_rate() -> None:
    p = nn.Parameter(torch.zeros(4, 3))
    for given in (ps.RandomK(0.5), ps.Compression(ps.RandomK(0.5))):  # alike, and by keyword too
        with pytest.warns(UserWarning, match=r"nothing will be compressed.*dense_below=256"):
            opts = [ps.CompressedSGD([p], 0.1, given), ps.CompressedSGD([p], 0.1, compressor=given)]
        assert [opt.compressor for opt in opts] == [ps.RandomK(0.5)] * 2
    with pytest.raises(TypeError, match="positional"):
        ps.CompressedSGD([p], 0.1, ps.RandomK(0.5), 0.01)  # type: ignore[misc]


def test_state_keeps_its_precision() -> None:
    """torch would cast the float32 error memory of bfloat16 parameters to bfloat16."""
    model, data = nn.Linear(40, 40).bfloat16(), torch.randn(8, 40).bfloat16()
    opt = ps.CompressedSGD(model.parameters(), 0.1, compressor=ps.RandomK(0.1))
    train(model, data, opt, 3)
    resumed = ps.CompressedSGD(nn.Linear(40, 40).bfloat16().parameters(), 0.1, compressor=ps.RandomK(0.1))
    resumed.load_state_dict(opt.state_dict())
    assert opt.error().dtype == torch.float32
    assert torch.equal(resumed.error(), opt.error())


def test_state_that_does_not_fit_changes_nothing() -> None:
    model, data = network()
    opt = make(model, data)
    train(model, data, opt, 3)
    error, state = opt.error(), opt.state_dict()
    (group,) = state["param_groups"]
    turned = [nn.Parameter(torch.zeros(6, 20, dtype=torch.float64)), *list(model.parameters())[1:]]
    fewer = ps.CompressedSGD(nn.Linear(20, 6).parameters(), 0.1, compressor=ps.Identity(), seed=3)
    older = f"reads format {FORMAT}: finish the run with the packsaddle that saved it, or load the weights alone"
    wrong: dict[str, Any] = {
        f"the state has format 1, .* {older}": state | {"param_groups": [group | {"format": 1}]},
        r"has no param_groups\[0\]\.format; was it saved by CompressedSGD\?": without(state, "format"),
        r"the state has no param_groups\[0\]\.step": without(state, "step"),
        "seed is 3 here, but the state was saved with seed 4": make(network()[0], data, seed=4).state_dict(),
        r"start of 0\.weight must have shape \(20, 6\), found nothing": make(model, data, escape=None).state_dict(),
        "the state is of 2 parameters, and there are 4": fewer.state_dict(),
        r"must have shape \(20, 6\), found shape \(6, 20\)": ps.CompressedSGD(
            turned, 0.1, compressor=ps.Identity(), seed=3
        ).state_dict(),
    }
    for message, bad in wrong.items():
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(bad)
        assert torch.equal(opt.error(), error)
    opt.load_state_dict(state)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    groups = [{key: value for key, value in group.items() if key != name} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def test_changing_the_learning_rate_keeps_y_and_rescales_e() -> None:
    model, data = network()
    opt = make(model, data, escape=None)
    train(model, data, opt, 5)
    y, e = opt.corrected(), opt.error()
    opt.param_groups[0]["lr"] = 0.02
    assert torch.equal(opt.corrected(), y)
    assert torch.allclose(opt.error(), e * (0.1 / 0.02))
    opt.param_groups[0]["lr"] = 0.0  # a warm-up from zero
    assert torch.equal(opt.corrected(), y)
    with pytest.raises(RuntimeError, match="error\\(\\) divides by the learning rate, which is 0"):
        opt.error()


def test_scheduler() -> None:
    """With a scheduler, y still moves by exactly -eta_t (grad + xi_t): here no noise, so y_T is a plain sum."""
    model, data = network()
    opt = make(model, data, escape=None, noise=0.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    expected = vector(model)
    for t in range(6):
        opt.zero_grad()
        (model(data) - data).square().mean().backward()
        expected -= 0.1 * 0.5**t * torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])
        opt.step()
        scheduler.step()
    assert torch.allclose(opt.corrected(), expected, rtol=1e-12, atol=1e-14)


def test_groups_have_their_own_rates() -> None:
    """y moves by each group's own eta (grad + weight_decay x), whatever the layout; e is in units of a gradient."""
    weights = [nn.Parameter(torch.full(shape, 2.0, dtype=torch.float64)) for shape in ((4, 5), (3,), (6, 2))]
    groups = [{"params": weights[:2], "lr": 0.5}, {"params": weights[2:], "weight_decay": 0.25}]
    opt = ps.CompressedSGD(groups, 0.1, ps.Compression(ps.RandomK(k=2), dense_below=4))
    for p in weights:
        p.grad = torch.ones_like(p)
    opt.step()
    y = torch.cat([torch.full((23,), 2.0 - 0.5), torch.full((12,), 2.0 - 0.1 * (1 + 0.25 * 2))]).double()
    assert torch.allclose(opt.corrected(), y)
    e, x = opt.error(), nn.utils.parameters_to_vector(weights).detach()
    # Two coordinates were sent; the vector (3,) went dense. All others hold grad + weight_decay x.
    assert int((e[:20] == 0).sum() + (e[23:] == 0).sum()) == 2
    assert not e[20:23].any()
    assert set(e.round(decimals=12).tolist()) <= {0.0, 1.0, 1.5}
    assert torch.allclose(x[20:23], y[20:23])


def test_dense_tensors_bytes_and_mu() -> None:
    model = nn.Sequential(nn.Linear(50, 40), nn.LayerNorm(40), nn.Linear(40, 4))  # 2000 | 40 40 40 160 4
    opt = ps.CompressedSGD(model.parameters(), 0.1, compressor=ps.RandomK(0.01))
    (model(torch.ones(2, 50)).sum()).backward()
    opt.step()
    assert (opt.numel, opt.compressed_numel) == (2284, 2000)
    moved = opt.ledger.at(0)
    assert moved["values"].payload == 20 * 4
    assert moved["dense"].payload == 284 * 4
    assert moved["dense"].sent == 0  # one worker
    assert opt.mu == pytest.approx((20 + 284) / 2284)


def test_closure_and_parameters_without_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(3, 1)), nn.Parameter(torch.ones(2, 1))
    opt = ps.CompressedSGD([used, unused], 0.1, ps.Compression(ps.Identity(), dense_below=0))

    def closure() -> float:
        opt.zero_grad()
        loss = used.sum() * 2
        loss.backward()
        return loss.item()

    assert opt.step(closure) == 6.0
    assert torch.allclose(used, torch.full((3, 1), 0.8))
    assert torch.equal(unused, torch.ones(2, 1))


@pytest.mark.parametrize("exchange", ["direct", "two-way"])
@pytest.mark.parametrize(
    "c",
    [ps.Sign(), ps.LinearSketch(0.5), ps.QSGD(), ps.LowRank(), ps.TopK(k=1), ps.SketchTopK(k=2), ps.SharedTopK(k=4)],
    ids=repr,
)
def test_no_compressor_moves_what_is_frozen(c: ps.Compressor, exchange: str) -> None:
    """Sign makes something of zeros, sketches leak between coordinates, an owner may hold an error back; until it is no
    longer frozen."""
    if exchange == "two-way" and isinstance(c, ps.LowRank | ps.SketchTopK | ps.SharedTopK):
        exchange = "direct"
    a, b = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(5, 4))
    opt = ps.CompressedSGD([a, b], 0.1, ps.Compression(c, dense_below=0, exchange=exchange), noise=0.5)
    before = b.clone()
    for step in range(24):
        if step in (3, 12):
            before = b.clone()
            b.requires_grad_(step == 12)
        a.grad = torch.ones_like(a)
        b.grad = torch.full_like(b, 1.0 if step < 3 else 9.0) if b.requires_grad else None
        opt.step()
        if step == 11:
            assert torch.equal(b, before)
    assert not torch.equal(b, before)
    assert not torch.equal(a, torch.ones(5, 4))


def test_gradients_and_torchs_random_state_are_left_alone() -> None:
    model, data = network()
    opt = make(model, data)
    (model(data) - data).square().mean().backward()
    before, state = [p.grad.clone() for p in model.parameters() if p.grad is not None], torch.random.get_rng_state()
    opt.step()
    assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters(), strict=True) if p.grad is not None)
    assert torch.equal(torch.random.get_rng_state(), state)


W = nn.Parameter(torch.ones(40, 40))


def ramp(step: int) -> ps.Compressor:
    return ps.RandomK(0.1 + 0.1 / (1 + step))


def sgd(*arguments: Any, params: Any = (W,), **options: Any) -> ps.CompressedSGD:
    return ps.CompressedSGD(params, *arguments, **options)


def spec(compressor: Any = ramp, **options: Any) -> ps.Compression:
    return ps.Compression(compressor, **options)


REFUSALS: dict[str, Callable[[], object]] = {
    r"must be parameters, got the module Linear: pass \.parameters\(\)": lambda: sgd(0.1, params=nn.Linear(1, 1)),
    r"floating point, but parameter 0 is torch\.int64": lambda: sgd(0.1, params=[torch.ones(3).long()]),
    "empty parameter list": lambda: sgd(0.1, params=[]),
    "lr must be a number, got '0.1'": lambda: sgd("0.1"),
    "lr must be a number, got True": lambda: sgd(True),
    r"lr must be finite and not negative, got -0\.1": lambda: sgd(-0.1),
    "weight_decay must be finite and not negative, got nan": lambda: sgd(0.1, weight_decay=math.nan),
    "noise must be finite and not negative, got -1": lambda: sgd(0.1, noise=-1.0),
    r"seed must be an integer, got 1\.5": lambda: sgd(0.1, seed=1.5),
    "dense_below must be an integer of at least 0, got -1": lambda: spec(dense_below=-1),
    "max_skipped must be an integer of at least 0, got 2.5": lambda: spec(max_skipped=2.5),
    r"back must be a packsaddle Compressor or None, got 0\.1": lambda: spec(exchange="two-way", back=0.1),
    r"k of RandomK must be at most d = 1600 \(the coordinates\)": lambda: sgd(0.1, ps.RandomK(k=2000)),
    "compressor must be a packsaddle Compressor": lambda: sgd(0.1, 0.01),
    r"got <function ramp.*: functions of the step are for register_ddp_hook": lambda: sgd(0.1, spec()),
    "takes all its parameters at construction": lambda: sgd(0.1).add_param_group({"params": [W]}),
    "cannot be copied or pickled; use state_dict": lambda: copy.deepcopy(sgd(0.1)),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message: str) -> None:
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        REFUSALS[message]()


ALONE: dict[str, Callable[[nn.Module], object]] = {
    "CompressedSGD": lambda model: ps.CompressedSGD(model.parameters(), 0.1),
    "LocalUpdates": lambda model: ps.LocalUpdates(torch.optim.AdamW(model.parameters())),
    "attach": ps.attach,
}


@pytest.mark.parametrize("front", ALONE)
def test_a_process_of_several_that_would_train_alone_raises(front: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = r"WORLD_SIZE is 4, .*call torch\.distributed\.init_process_group\(\) before"
    with pytest.raises(RuntimeError, match=message):
        ALONE[front](nn.Linear(40, 40))
    for alone in ("1", ""):
        monkeypatch.setenv("WORLD_SIZE", alone)
        ALONE[front](nn.Linear(40, 40))


def test_a_process_of_several_may_train_alone_on_purpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = nn.Linear(40, 40)
    assert ps.CompressedSGD(model.parameters(), 0.1, process_group=Solo()).channel.group.size == 1
    assert "workers=1" in repr(ps.LocalUpdates(torch.optim.AdamW(model.parameters()), workers=Solo()))
    for repeated in ps.simulate(
        lambda rank: repr(ps.LocalUpdates(torch.optim.AdamW(nn.Linear(40, 40).parameters()))), 2
    ):
        assert "workers=2" in repeated


TWO_WAY: dict[str, Any] = {"compressor": ps.TopK(0.3), "exchange": "two-way", "back": ps.TopK(0.1), "escape": None}


@pytest.mark.parametrize("changes", [{}, TWO_WAY], ids=["direct", "two-way"])
def test_torch_checkpoint_tools_round_trip(changes: dict[str, Any]) -> None:
    """torch's distributed checkpoint names parameters instead of numbering them; an owner's error is in it too."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, data = network()
    opt = make(model, data, **changes)
    train(model, data, opt, 5)
    saved, weights = copy.deepcopy(get_optimizer_state_dict(model, opt)), copy.deepcopy(model.state_dict())
    error, y, steps = opt.error(), opt.corrected(), opt.steps
    assert error.any()
    train(model, data, opt, 3)
    model.load_state_dict(weights)
    set_optimizer_state_dict(model, opt, saved)
    assert torch.equal(opt.error(), error)
    assert torch.equal(opt.corrected(), y)
    assert opt.steps == steps


@pytest.mark.parametrize("other", ["direct", "coordinator"])
def test_another_exchange_continues_with_an_owners_error(other: str) -> None:
    model, data = network()
    opt = make(model, data, **TWO_WAY)
    train(model, data, opt, 5)
    changed = {**TWO_WAY, "exchange": other, "back": None if other == "direct" else ps.TopK(0.1)}
    another = make(network()[0], data, **changed)
    another.load_state_dict(opt.state_dict())
    assert torch.equal(another.error(), opt.error())


def test_a_warm_start_that_does_not_fit_is_left_out() -> None:
    states = []
    for matrix_rank in (1, 2):
        model, data = network()
        opt = make(model, data, compressor=ps.LowRank(matrix_rank), escape=None)
        for state in states:
            opt.load_state_dict(state)
        train(model, data, opt, 2)
        states.append(opt.state_dict())
    assert len(states[1]["aggregator"]["state"]["qs"][0]) == 6


def test_another_workers_state_is_refused() -> None:
    def worker(rank: int) -> str:
        model, data = network()
        opt = make(model, data)
        train(model, data, opt, 2)
        states.append(opt.state_dict())
        opt.error()  # a collective: both states are there after it
        if rank == 1:
            with pytest.raises(ValueError, match="rank is 1 here, but the state was saved with rank 0"):
                opt.load_state_dict(states[0])
        return "done"

    states: list[Any] = []
    assert ps.simulate(worker, 2) == ["done", "done"]


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"seed": 1}, r"worker 0 has seed=0 and worker 1 has seed=1"),
        (
            {"compressor": ps.TopK(0.2)},
            r"worker 0 has compressor=RandomK\(ratio=0\.2.* and worker 1 has compressor=TopK",
        ),
        ({"noise": 0.5}, r"worker 0 has noise=0\.0 and worker 1 has noise=0\.5"),
        ({"lr": 0.5}, r"worker 0 has lr=\[0\.1\] and worker 1 has lr=\[0\.5\]"),
        ({"escape": ps.Escape(5, 1.0, float)}, r"worker 0 has escape=None and worker 1 has escape=Escape\(interval=5"),
        ({"exchange": "two-way"}, "worker 0 has exchange='direct' and worker 1 has exchange='two-way'"),
        ({"params": [nn.Parameter(torch.ones(80, 40))]}, "worker 0 has numel=1600 and worker 1 has numel=3200"),
        ({"params": [nn.Parameter(torch.ones(20, 80))]}, r"has params\[0\]='parameter 0 \[20, 80\] torch\.float32'"),
        (
            {"params": [("b", W)]},
            r"worker 1 has params\[0\]='b \[40, 40\]",
        ),
    ],
)
def test_workers_with_other_arguments_are_told_at_the_start(difference: dict[str, Any], message: str) -> None:
    def worker(rank: int) -> None:
        arguments = {"params": [W], "lr": 0.1, "seed": 0, "compressor": ps.RandomK(0.2), **(difference if rank else {})}
        ps.CompressedSGD(**folded(arguments))

    with pytest.raises(ValueError, match=message):
        ps.simulate(worker, 2)


def test_equal_functions_are_equal_arguments() -> None:
    """Each worker has its own objective and schedule objects, which lie at other addresses; numpy's seeds are seeds."""

    def worker(rank: int) -> int:
        given: dict[str, Any] = {"noise": lambda step: 0.1, "escape": ps.Escape(5, 1.0, lambda: float(W.sum()))}
        return ps.CompressedSGD([W], 0.1, seed=5 if rank else np.int64(5), **given).numel

    assert ps.simulate(worker, 2) == [1600, 1600]


@pytest.mark.parametrize("name", ["lr", "weight_decay"])
def test_a_rate_that_is_none_is_refused_at_the_step(name: str) -> None:
    model, data = network()
    opt = make(model, data)
    train(model, data, opt, 2)
    x, e, rate = vector(model), opt.error(), opt.param_groups[0][name]
    for value in (-1.0, math.nan, math.inf, torch.tensor(-1.0)):
        opt.param_groups[0][name] = value
        with pytest.raises(ValueError, match=rf"^{name} must be finite and not negative, got {float(value):g}$"):
            opt.step()
    opt.param_groups[0][name] = rate
    assert torch.equal(vector(model), x)
    assert torch.equal(opt.error(), e)
    assert opt.steps == 2
    train(model, data, opt, 1)
    pair = ps.CompressedSGD([{"params": [nn.Parameter(torch.ones(20, 20))]} for _ in range(2)], 0.1)
    pair.param_groups[1][name] = -1
    with pytest.raises(ValueError, match=f"{name} of parameter group 1 must be finite and not negative, got -1"):
        pair.step()


COUNTS: dict[str, Callable[[bool], object]] = {
    "seed": lambda flag: ps.CompressedSGD([nn.Parameter(torch.ones(3))], 0.1, ps.Identity(), seed=flag),
    "interval": lambda flag: ps.Escape(flag, 1.0, lambda: 0.0),
    "every": lambda flag: ps.Escape(5, 1.0, lambda: 0.0, every=flag),
    **{
        name: lambda flag, name=name: ps.Compression(ps.RandomK(0.5), **{name: flag})  # type: ignore[misc]
        for name in ("dense_below", "max_skipped", "compare_every", "monitor_every")
    },
}


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("flag", [True, False])
def test_a_flag_is_no_count(name: str, flag: bool) -> None:
    with pytest.raises(ValueError, match=rf"^{name} .*must be .*, got {flag}$"):
        COUNTS[name](flag)


def test_a_sparse_gradient_leaves_the_memory_alone() -> None:
    embedding = nn.Embedding(50, 40, sparse=True)
    opt = ps.CompressedSGD(embedding.named_parameters(), 0.1, noise=1.0)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        opt.step()
    assert not opt.error().any()


@pytest.mark.parametrize("dense_below", [0, 10**6])
def test_sixteen_bit_parameters_lose_nothing(dense_below: int) -> None:
    """1,000 updates of 1e-3 on bfloat16 ones, each below half a unit in the last place, still arrive at 0."""
    p, opt = lone(torch.ones(64, 2, dtype=torch.bfloat16), 1e-3, ps.Identity(), dense_below=dense_below)
    feed(p, opt, *[1.0] * 1000)
    assert opt.corrected().abs().max() < 1e-4
    assert p.abs().max() < 0.01


@pytest.mark.parametrize("dense_below", [0, 10**6])
def test_a_commit_keeps_what_sixteen_bits_cannot_hold(dense_below: int) -> None:
    """Steps of 0.05 on a bfloat16 100, whose neighbour is 99.5, with a commit every fourth step: 95 after 100."""
    calls = itertools.count()  # f(x_t), asked for first, is always below f(x_t')
    escape, x = ps.Escape(3, 1e9, lambda: next(calls)), torch.full((64, 2), 100.0, dtype=torch.bfloat16)
    p, opt = lone(x, 0.05, ps.Identity(), dense_below=dense_below, escape=escape)
    feed(p, opt, *[1.0] * 100)
    assert [r.committed for r in opt.resets] == [True] * 25
    assert torch.allclose(opt.corrected(), torch.full((128,), 95.0), atol=1e-3)


@pytest.mark.parametrize("c", [*compressors(0.5), ps.TopK(k=2), ps.SharedTopK(k=12, block_size=2)], ids=repr)
def test_a_nan_is_seen(c: ps.Compressor) -> None:
    """Where no step is left out a NaN reaches x with every compressor, and the monitor does not call it perfect."""
    p, opt = lone(torch.zeros(10, 6), 0.1, c, monitor_every=1, max_skipped=None)
    first = torch.ones(10, 6)
    first[3, 2] = math.nan
    feed(p, opt, first, *[1.0] * 11)
    assert p.isnan().any()
    assert opt.monitor.whole is not None
    assert math.isnan(opt.monitor.whole)


def test_monitor_measures_single_steps() -> None:
    """RandomK of equal magnitudes keeps exactly k/d, TopK of one spike everything, a dense tensor everything."""
    w, b = nn.Parameter(torch.zeros(20, 10)), nn.Parameter(torch.zeros(7))
    opt = ps.CompressedSGD([("w", w), ("b", b)], 0.5, ps.Compression(ps.RandomK(0.1), dense_below=8, monitor_every=2))
    for step in range(2):
        assert opt.monitor.whole is None
        w.grad, b.grad = torch.ones_like(w), torch.full_like(b, 2.0)
        if step:
            opt._memory.reset()
        opt.step()
    assert opt.monitor.by_tensor["w"] == pytest.approx(0.1)
    assert opt.monitor.by_tensor["b"] == 1.0
    assert opt.monitor.whole == pytest.approx((20 + 4 * 7) / (200 + 4 * 7))


@pytest.mark.parametrize("c", [ps.Sign(per_tensor=True), ps.LowRank()], ids=repr)
def test_compressors_that_know_tensors(c: Any) -> None:
    """The optimizer tells them where tensors are: matrices of rank one are kept whole, each tensor has its scale."""
    weights = [nn.Parameter(torch.zeros(8, 6)), nn.Parameter(torch.zeros(5, 9))]
    opt = ps.CompressedSGD(weights, 1.0, ps.Compression(c, dense_below=0))
    for i, p in enumerate(weights):
        rank_one = torch.linspace(1, 2, len(p))[:, None] * torch.ones(p.shape[1])
        p.grad = torch.full_like(p, 10.0**i) if isinstance(c, ps.Sign) else rank_one
    opt.step()
    assert torch.allclose(opt.error(), torch.zeros(93), atol=1e-5)


def test_a_step_of_randomk_makes_no_vector_of_the_models_size() -> None:
    """After the first step nothing is allocated that grows with d, with noise too."""
    w, opt = lone(torch.zeros(1000, 1000), 0.1, ps.RandomK(0.01), noise=0.1)
    feed(w, opt, 1.0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        opt.step()
    sizes = [event.self_cpu_memory_usage for event in profile.events() or ()]
    assert 0 < max(sizes) < 4 * w.numel() / 5  # the largest is the message's, 1% of the vector, or of counters


def test_scalars_travel_with_the_step() -> None:
    """Their mean over workers, in one collective with the rest; the step is the same without them."""

    def work(scalars: bool, rank: int) -> tuple[torch.Tensor, torch.Tensor, set[str], int]:
        model, data = network()
        opt = make(model, data, escape=None)
        calls: list[int] = []
        reduce = opt.channel.group.all_reduce
        opt.channel.group.all_reduce = lambda tensor: (calls.append(1), reduce(tensor))  # type: ignore
        for _ in range(3):
            opt.zero_grad()
            loss = (model(data) - data).square().mean()
            loss.backward()
            opt.step(scalars=torch.stack([loss.detach(), torch.tensor(float(rank))]) if scalars else None)
        found = vector(model), opt.scalars, set(opt.ledger.by_purpose), len(calls)
        opt.step(scalars=loss)
        assert opt.scalars.shape == (1,)  # a number is as good as a vector
        return found

    (x, means, purposes, calls), (without, nothing, same, _) = (
        ps.simulate(partial(work, scalars), 2)[0] for scalars in (True, False)
    )
    assert torch.equal(x, without)
    assert calls == 3
    assert means[1] == 0.5
    assert 0 < means[0] < 2
    assert len(nothing) == 0
    assert purposes == same


def test_what_it_is_can_be_read() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
    opt = ps.CompressedSGD(model.parameters(), 0.1, ps.RandomK(0.01))
    of = "RandomK(ratio=0.01) on 32,768 of 33,088 coordinates"
    assert repr(opt) == f"CompressedSGD(lr=0.1, {of}, exchange=all-reduce, workers=1, steps=0)"
    local = ps.LocalUpdates(torch.optim.AdamW(model.parameters()), every=8, compressor=ps.TopK(0.5))
    about = "every=8, TopK(ratio=0.5), outer=mean, fragments=1, workers=1, steps=0, rounds=0"
    assert repr(local) == f"LocalUpdates(AdamW, {about})"
