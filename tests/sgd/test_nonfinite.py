"""A step whose gradient is not finite leaves no trace: the run is one in which its batch never existed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    NonFiniteError,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    Storm,
    TopK,
    simulate,
)
from packsaddle.comm.group import resolve
from packsaddle.numerics.finite import is_finite
from packsaddle.sgd import memories

Gloo = Callable[..., list[Any]]
Batch = tuple[int, bool]  # its number, and whether one worker's is bad
WORKERS, STEPS = 3, 10
BAD = float("nan"), float("inf"), -float("inf")


def plan(seed: int) -> list[Batch]:
    """Some batches at random steps are bad, once two in a row."""
    chosen = torch.randperm(STEPS - 2, generator=torch.Generator().manual_seed(seed))[:3].tolist()
    bad = {*chosen, chosen[0] + 1}
    return [(batch, batch in bad) for batch in range(STEPS)]


def run(batches: list[Batch], seed: int = 0, scaler: float = 0.0, **options: Any) -> dict[str, Any]:
    """Train on the batches; of a bad one a random coordinate of a random tensor of a random worker is not finite."""
    rank = resolve(None).rank
    torch_start = torch.Generator().manual_seed(3)
    shapes = (6, 5), (9,), (4, 7), (5,)
    weights = [nn.Parameter(torch.randn(s, generator=torch_start)) for s in shapes]
    dtype = options.pop("dtype", torch.float32)
    weights = [nn.Parameter(w.detach().to(dtype)) for w in weights]
    opt = CompressedSGD(weights, 0.05, **folded({"dense_below": 12, "noise": 0.01, "seed": 5} | options))
    scale = torch.amp.GradScaler("cpu", init_scale=scaler, growth_interval=3) if scaler else None
    for batch, bad in batches:
        rng = torch.Generator().manual_seed(100 * batch + rank)
        targets = [torch.randn(w.shape, generator=rng).to(dtype) for w in weights]
        dice = torch.Generator().manual_seed(1000 * seed + batch)
        worker, tensor, value = (int(torch.randint(n, (1,), generator=dice)) for n in (WORKERS, len(weights), 3))

        def closure(targets: Any = targets, spoil: bool = bad and worker == rank) -> Tensor:
            opt.zero_grad()
            loss = sum((0.5 * (w - t).square().sum() for w, t in zip(weights, targets, strict=True)), torch.zeros(()))
            torch.autograd.backward(loss if scale is None else scale.scale(loss))
            if spoil:
                weights[tensor].grad.view(-1)[2] = BAD[value]  # type: ignore[union-attr] # noqa: B023
            return loss

        if scale is None:
            opt.step(closure)
        else:
            closure()
            scale.step(opt)
            scale.update()
    state = opt.state_dict()
    flat = {f"{i} {name}": v.clone() for i, vectors in state["state"].items() for name, v in vectors.items()}
    return {
        "x": [w.detach().clone() for w in weights],
        "steps": opt.steps,
        "skipped": opt.skipped,
        "skips": [(s.step, s.workers, s.parameter) for s in opt.skips],
        "noise": state["noise"],
        "aggregator": state["aggregator"],
        "resets": [(r.step, r.committed, r.distance) for r in opt.resets],
        **flat,
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    return [name for name in a if name not in ("skipped", "skips") and not equal(a[name], b[name])]


COMPRESSORS: dict[str, Compressor] = {
    "Identity": Identity(),
    "TopK": TopK(k=5),
    "RandomK": RandomK(0.2),
    "AdaptiveTopK": AdaptiveTopK(0.5),
    "Sign": Sign(),
    "QSGD": QSGD(),
    "SharedTopK": SharedTopK(0.2, block_size=2),
    "SketchTopK": SketchTopK(k=1, rows=3, columns=4),
    "LinearSketch": LinearSketch(0.5),
    "LowRank": LowRank(),
}
WAYS: dict[str, dict[str, Any]] = {name: {"compressor": c} for name, c in COMPRESSORS.items()}
for way in ("two-way", "coordinator"):
    WAYS |= {
        f"{way} {name}": {"compressor": COMPRESSORS[name], "exchange": way} for name in ("TopK", "RandomK", "QSGD")
    }
WAYS |= {
    "coordinator back": {"compressor": TopK(k=5), "exchange": "coordinator", "back": TopK(k=9)},
    "nothing dense": {"compressor": TopK(k=5), "dense_below": 0},
    "nothing dense, two-way": {"compressor": QSGD(), "dense_below": 0, "exchange": "two-way"},
    "all dense": {"compressor": TopK(k=1), "dense_below": 1000},
    "eager noise": {"compressor": RandomK(0.2), "lazy": False},
    "decay": {"compressor": TopK(k=5), "weight_decay": 0.1},
    "momentum": {"compressor": TopK(k=5), "momentum": 0.9},
    "nesterov": {"compressor": RandomK(0.2), "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "storm": {"compressor": TopK(k=5), "momentum": Storm(0.3), "weight_decay": 0.1},
    "ef21": {"compressor": TopK(k=5), "memory": "ef21"},
    "ef21 momentum": {"compressor": TopK(k=5), "memory": "ef21", "momentum": 0.5},
    "bfloat16": {"compressor": TopK(k=5), "dtype": torch.bfloat16},
    "float64": {"compressor": TopK(k=5), "dtype": torch.float64},
    "escape": {"compressor": TopK(k=5), "escape": Escape(4, 2.0, lambda: 0.0)},
    "monitor": {"compressor": TopK(k=5), "monitor_every": 1},
}


@pytest.mark.filterwarnings("ignore:.*has nothing to do:UserWarning", "ignore:.*compress.*:UserWarning")
@pytest.mark.parametrize(("way", "seed"), [(way, i % 3) for i, way in enumerate(WAYS)])
def test_a_bad_batch_leaves_no_trace(way: str, seed: int) -> None:
    batches = plan(seed)
    without = [batch for batch in batches if not batch[1]]
    runs = simulate(lambda rank: run(batches, seed, **WAYS[way]), WORKERS)
    twins = simulate(lambda rank: run(without, seed, **WAYS[way]), WORKERS)
    for mine, twin in zip(runs, twins, strict=True):
        assert differences(mine, twin) == []
        assert (mine["skipped"], twin["skipped"]) == (4, 0)
        assert mine["steps"] == STEPS - 4
        assert mine["skips"] == runs[0]["skips"]  # all know who it was, and which tensor
    assert all(len(workers) == 1 and name.startswith("parameter ") for _, workers, name in runs[0]["skips"])


SCALED = ("TopK", "RandomK", "QSGD", "two-way TopK", "ef21", "momentum", "decay", "LowRank")


@pytest.mark.parametrize(("way", "seed"), [(way, i % 3) for i, way in enumerate(SCALED)])
def test_nor_behind_a_scaler(way: str, seed: int) -> None:
    """Its scale is out of the error memory; a worker alone with an Inf does not leave the others waiting."""
    batches = plan(seed)
    without = [batch for batch in batches if not batch[1]]
    runs = simulate(lambda rank: run(batches, seed, 1024.0, **WAYS[way]), WORKERS)
    twins = simulate(lambda rank: run(without, seed, 1024.0, **WAYS[way]), WORKERS)
    plain = simulate(lambda rank: run(without, seed, **WAYS[way]), WORKERS)
    for mine, twin, unscaled in zip(runs, twins, plain, strict=True):
        assert differences(mine, twin) == differences(twin, unscaled) == []
        assert mine["skipped"] == 4


REVOCABLE = [way for way in WAYS if not any(name in way for name in ("momentum", "nesterov", "storm", "ef21", "QSGD"))]


@pytest.mark.filterwarnings("ignore:.*has nothing to do:UserWarning", "ignore:.*compress.*:UserWarning")
@pytest.mark.parametrize("way", REVOCABLE)
def test_in_a_large_memory_it_leaves_rounding(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large vectors have no second one: a bad batch is subtracted again. Without bad batches the bits are the same."""
    batches = plan(0)
    without = [batch for batch in batches if not batch[1]]
    beside = simulate(lambda rank: run(without, **WAYS[way]), WORKERS)
    monkeypatch.setattr(memories, "_LARGE", 0)
    twins = simulate(lambda rank: run(without, **WAYS[way]), WORKERS)
    assert [differences(mine, twin) for mine, twin in zip(twins, beside, strict=True)] == [[]] * WORKERS
    runs = simulate(lambda rank: run(batches, **WAYS[way]), WORKERS)
    for mine, twin in zip(runs, twins, strict=True):
        assert mine["skipped"] == 4
        assert mine["steps"] == twin["steps"]
        assert mine["skips"] == runs[0]["skips"]
        tolerance = 1e-2 if way == "bfloat16" else 1e-5  # a last bit of x in 16 bits may fall the other way
        vectors = [name for name, value in mine.items() if isinstance(value, Tensor)]
        assert vectors
        for a, b in [(mine[name], twin[name]) for name in vectors] + list(zip(mine["x"], twin["x"], strict=True)):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert [equal(a, b) for a, b in zip(mine["x"], runs[0]["x"], strict=True)] == [True] * 4  # on all workers


def leaves_out_a_step_of_a_million(rank: int) -> dict[str, Any]:
    """One good step, then one that is bad on worker 1, of 2^20 + 9 coordinates in three tensors."""
    rng = torch.Generator().manual_seed(rank)
    weights = [nn.Parameter(torch.zeros(n, 3)) for n in (300_000, 49_000)] + [nn.Parameter(torch.zeros(1585))]
    opt = CompressedSGD(weights, 0.1, Compression(TopK(k=5), dense_below=0), noise=0.01, weight_decay=0.1, seed=4)
    for step in range(2):
        for w in weights:
            w.grad = torch.randn(w.shape, generator=rng)
        if step == 1:
            before = [w.detach().clone() for w in weights], [opt.state[w]["error"].clone() for w in weights]
            if rank == 1:
                weights[1].grad[41_000, 2] = math.nan  # type: ignore[index]
        opt.step()
    after = [w.detach().clone() for w in weights], [opt.state[w]["error"].clone() for w in weights]
    assert opt.skips[0].parameter == "parameter 1"
    return {"skipped": opt.skipped, "spare": opt.spare_bytes, "before": before, "after": after}


def test_a_million_coordinates_have_no_second_vector() -> None:
    for found in simulate(leaves_out_a_step_of_a_million, 2):
        assert (found["skipped"], found["spare"]) == (1, 0)
        assert equal(found["before"][0], found["after"][0])
        for a, b in zip(found["before"][1], found["after"][1], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-7)  # of gradients times 0.1


@pytest.mark.parametrize("size", [1e15, 1e25, 3e38])
def test_what_is_huge_is_tried_beside_the_memory(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of it overflow, but nothing else need to: the step is taken, with the bits of a small vector's."""

    def two_steps() -> list[Tensor]:
        p = nn.Parameter(torch.zeros(40, 40))
        opt = CompressedSGD([p], 1e-3, Compression(TopK(k=9), dense_below=0))
        for seed in range(2):
            p.grad = torch.rand(40, 40, generator=torch.Generator().manual_seed(seed)) * size
            opt.step()
        return [p.detach(), opt.state[p]["error"].clone(), torch.tensor(opt.skipped)]

    beside = two_steps()
    monkeypatch.setattr(memories, "_LARGE", 0)
    assert equal(two_steps(), beside)


def of_three(batches: list[Batch], way: str) -> dict[str, Any]:
    return run(batches, 1, **WAYS[way])


def test_between_processes(gloo: Gloo) -> None:
    way, batches = "two-way TopK", plan(1)
    without = [batch for batch in batches if not batch[1]]
    runs, twins = (gloo(of_three, WORKERS, b, way) for b in (batches, without))
    assert [differences(mine, twin) for mine, twin in zip(runs, twins, strict=True)] == [[]] * WORKERS
    assert [mine["skipped"] for mine in runs] == [4] * WORKERS


def test_an_overflow_of_the_sum_is_no_overflow_of_a_gradient() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    opt = CompressedSGD([p], 1e-3, Compression(Identity(), dense_below=0))
    p.grad = torch.full((4, 4), 3e38)
    opt.step()
    assert opt.skipped == 0
    assert torch.equal(p, torch.full((4, 4), -1e-3).mul(3e38))


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40) | st.just([3e38] * 9) | st.just([3e38, -3e38, math.inf]),
)
def test_finite_is_what_every_coordinate_is(values: list[float]) -> None:
    vector = torch.tensor(values)
    assert bool(is_finite(vector)) == all(math.isfinite(v) for v in vector.tolist())


# ---- too many in a row


def gives_up(most: int, bad: int) -> tuple[str, dict[str, Any]]:
    rank = resolve(None).rank
    p = nn.Parameter(torch.ones(5, 5))
    opt = CompressedSGD([("weights", p)], 0.1, Compression(TopK(k=3), dense_below=0, max_skipped=most), noise=0.1)
    p.grad = torch.ones_like(p)
    opt.step()
    before = {"x": p.detach().clone(), "error": opt.state_dict()["state"][0]["error"].clone()}
    message = ""
    try:
        for _ in range(bad):
            p.grad = torch.ones_like(p) * (float("nan") if rank == 1 else 1.0)
            opt.step()
    except NonFiniteError as error:
        message = str(error)
    after = {"x": p.detach().clone(), "error": opt.state_dict()["state"][0]["error"].clone()}
    return message, {"kept": equal(before, after), "steps": opt.steps, "skipped": opt.skipped}


def test_too_many_in_a_row_stop_all_workers_with_nothing_lost() -> None:
    for most in (0, 2):
        for message, found in simulate(lambda rank, most=most: gives_up(most, most + 1), 2):
            assert message.startswith("step 1: weights is not finite on worker 1; ")
            assert f"{most + 1} consecutive step" in message
            assert f"max_skipped={most}" in message
            assert found == {"kept": True, "steps": 1, "skipped": most + 1}
        for message, found in simulate(lambda rank, most=most: gives_up(most, most), 2):
            assert (message, found["skipped"]) == ("", most)


def test_a_step_that_is_taken_begins_the_row_anew() -> None:
    p = nn.Parameter(torch.ones(5, 5))
    opt = CompressedSGD([p], 0.1, Compression(RandomK(0.01), max_skipped=1, dense_below=0))
    for value in (math.nan, 1.0, math.nan, 1.0, math.inf, 1.0):
        p.grad = torch.full_like(p, value)
        opt.step()
    again = CompressedSGD(
        [nn.Parameter(torch.ones(5, 5))], 0.1, Compression(RandomK(0.01), max_skipped=1, dense_below=0)
    )
    again.load_state_dict(opt.state_dict())
    assert (opt.steps, opt.skipped, again.steps, again.skipped) == (3, 3, 3, 3)
    p.grad = torch.full_like(p, math.nan)
    opt.step()
    again.load_state_dict(opt.state_dict())
    again.param_groups[0]["params"][0].grad = torch.full((5, 5), math.nan)
    with pytest.raises(NonFiniteError, match="2 consecutive steps"):
        again.step()


@pytest.mark.parametrize("most", [-1, 2.5, True])
def test_a_limit_that_is_no_count_is_refused(most: Any) -> None:
    with pytest.raises(ValueError, match=f"max_skipped must be an integer of at least 0, got {most}"):
        CompressedSGD(
            [nn.Parameter(torch.ones(5, 5))], 0.1, Compression(RandomK(0.01), dense_below=0, max_skipped=most)
        )


def test_it_costs_no_bytes() -> None:
    def moved(most: int | None) -> list[dict[str, Any]]:
        def worker(rank: int) -> dict[str, Any]:
            p, b = nn.Parameter(torch.ones(20, 5)), nn.Parameter(torch.ones(3))
            opt = CompressedSGD([p, b], 0.1, Compression(TopK(k=3), dense_below=10, max_skipped=most))
            for t in range(5):
                p.grad, b.grad = torch.full_like(p, t + rank), torch.ones_like(b)
                opt.step()
            return dict(opt.ledger.by_purpose)

        return simulate(worker, 2)

    with_it, without = moved(20), moved(None)
    for found, bare in zip(with_it, without, strict=True):
        # Only what is compared at the start says more with it: its own value.
        assert {k: v for k, v in found.items() if k != "start"} == {k: v for k, v in bare.items() if k != "start"}
