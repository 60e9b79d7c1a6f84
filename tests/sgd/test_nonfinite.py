"""A step whose gradient is not finite leaves no trace: the run is one in which its batch never existed."""

import math
from typing import Any

import pytest
import torch
from fronts import differences
from hypothesis import given
from hypothesis import strategies as st
from nightly import thinned
from problems import feed, lone
from specs import folded
from torch import Tensor, nn

import packsaddle as ps
from packsaddle.comm.group import resolve
from packsaddle.compressors import compressors
from packsaddle.numerics.finite import is_finite
from packsaddle.sgd import optimizer

Batch = tuple[int, bool]  # its number, and whether one worker's is bad
WORKERS, STEPS = 3, 10
BAD = float("nan"), float("inf"), -float("inf")


def plan(seed: int) -> list[Batch]:
    """Some batches at random steps are bad, once two in a row."""
    chosen = torch.randperm(STEPS - 2, generator=torch.Generator().manual_seed(seed))[:3].tolist()
    bad = {*chosen, chosen[0] + 1}
    return [(batch, batch in bad) for batch in range(STEPS)]


def with_and_without(seed: int) -> tuple[list[Batch], list[Batch]]:
    return plan(seed), [batch for batch in plan(seed) if not batch[1]]


IGNORED = pytest.mark.filterwarnings("ignore:.*has nothing to do:UserWarning", "ignore:.*compress.*:UserWarning")


def run(batches: list[Batch], seed: int = 0, scaler: float = 0.0, **options: Any) -> dict[str, Any]:
    """Train on the batches; of a bad one a random coordinate of a random tensor of a random worker is not finite."""
    rank = resolve(None).rank
    torch_start = torch.Generator().manual_seed(3)
    shapes = (6, 5), (9,), (4, 7), (5,)
    weights = [nn.Parameter(torch.randn(s, generator=torch_start)) for s in shapes]
    dtype = options.pop("dtype", torch.float32)
    weights = [nn.Parameter(w.detach().to(dtype)) for w in weights]
    opt = ps.CompressedSGD(weights, 0.05, **folded({"dense_below": 12, "noise": 0.01, "seed": 5} | options))
    scale = torch.amp.GradScaler("cpu", init_scale=scaler, growth_interval=3) if scaler else None
    for batch, bad in batches:
        rng = torch.Generator().manual_seed(100 * batch + rank)
        targets = [torch.randn(w.shape, generator=rng).to(dtype) for w in weights]
        dice = torch.Generator().manual_seed(1000 * seed + batch)
        worker, tensor, value = (int(torch.randint(n, (1,), generator=dice)) for n in (WORKERS, len(weights), 3))
        opt.zero_grad()
        loss = sum((0.5 * (w - t).square().sum() for w, t in zip(weights, targets, strict=True)), torch.zeros(()))
        torch.autograd.backward(loss if scale is None else scale.scale(loss))
        if bad and worker == rank:
            weights[tensor].grad.view(-1)[2] = BAD[value]  # type: ignore[union-attr]
        if scale is None:
            opt.step()
        else:
            scale.step(opt)
            scale.update()
    state = opt.state_dict()
    kept = {
        "x": [w.detach().clone() for w in weights],
        "noise": state["noise"],
        "aggregator": state["aggregator"],
        "resets": [(r.step, r.committed, r.distance) for r in opt.resets],
        "vectors": {i: {name: v.clone() for name, v in of.items()} for i, of in state["state"].items()},
    }
    skips = [(s.index, s.workers, s.parameter) for s in opt.skips]
    return {"state": kept, "steps": opt.steps, "skipped": opt.skipped, "skips": skips}


def all_differences(runs: list[dict[str, Any]], twins: list[dict[str, Any]]) -> list[list[str]]:
    """What differs between the states of two runs, by worker."""
    return [differences(a["state"], b["state"]) for a, b in zip(runs, twins, strict=True)]


# Every compressor, and those that have a support of their own with sizes at which they use it.
COMPRESSORS: dict[str, ps.Compressor] = {
    **{repr(c): c for c in compressors(0.2)},
    "TopK": ps.TopK(k=5),
    "RandomK": ps.RandomK(0.2),
    "QSGD": ps.QSGD(),
    "SharedTopK": ps.SharedTopK(0.2, block_size=2),
    "SketchTopK": ps.SketchTopK(k=1, rows=3, columns=4),
}
WAYS: dict[str, dict[str, Any]] = {name: {"compressor": c} for name, c in COMPRESSORS.items()}
for way in ("two-way", "coordinator"):
    WAYS |= {
        f"{way} {name}": {"compressor": COMPRESSORS[name], "exchange": way} for name in ("TopK", "RandomK", "QSGD")
    }
WAYS |= {
    "coordinator back": {"compressor": ps.TopK(k=5), "exchange": "coordinator", "back": ps.TopK(k=9)},
    "nothing dense": {"compressor": ps.TopK(k=5), "dense_below": 0},
    "nothing dense, two-way": {"compressor": ps.QSGD(), "dense_below": 0, "exchange": "two-way"},
    "all dense": {"compressor": ps.TopK(k=1), "dense_below": 1000},
    "eager noise": {"compressor": ps.RandomK(0.2), "lazy": False},
    "decay": {"compressor": ps.TopK(k=5), "weight_decay": 0.1},
    "momentum": {"compressor": ps.TopK(k=5), "momentum": 0.9},
    "nesterov": {"compressor": ps.RandomK(0.2), "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "bfloat16": {"compressor": ps.TopK(k=5), "dtype": torch.bfloat16},
    "float64": {"compressor": ps.TopK(k=5), "dtype": torch.float64},
    "escape": {"compressor": ps.TopK(k=5), "escape": ps.Escape(4, 2.0, lambda: 0.0)},
    "monitor": {"compressor": ps.TopK(k=5), "monitor_every": 1},
}


@IGNORED
@pytest.mark.parametrize(("way", "seed"), [(way, i % 3) for i, way in enumerate(WAYS)])
def test_a_bad_batch_leaves_no_trace(way: str, seed: int) -> None:
    runs, twins = (ps.simulate(lambda rank, b=b: run(b, seed, **WAYS[way]), WORKERS) for b in with_and_without(seed))
    assert all_differences(runs, twins) == [[]] * WORKERS
    for mine, twin in zip(runs, twins, strict=True):
        assert (mine["skipped"], twin["skipped"]) == (4, 0)
        assert mine["steps"] == twin["steps"] == STEPS - 4
        assert mine["skips"] == runs[0]["skips"]  # all know who it was, and which tensor
    assert all(len(workers) == 1 and name.startswith("parameter ") for _, workers, name in runs[0]["skips"])


SCALED = ("TopK", "RandomK", "QSGD", "two-way TopK", "momentum", "decay", repr(ps.LowRank()))


@pytest.mark.parametrize(("way", "seed"), [(way, i % 3) for i, way in enumerate(SCALED)])
def test_nor_behind_a_scaler(way: str, seed: int) -> None:
    """Its scale is out of the error memory; a worker alone with an Inf does not leave the others waiting."""
    batches, without = with_and_without(seed)
    runs, twins, plain = (
        ps.simulate(lambda rank, b=b, scale=scale: run(b, seed, scale, **WAYS[way]), WORKERS)
        for b, scale in ((batches, 1024.0), (without, 1024.0), (without, 0.0))
    )
    assert all_differences(runs, twins) == all_differences(twins, plain) == [[]] * WORKERS
    assert [mine["skipped"] for mine in runs] == [4] * WORKERS


# Those that are rounded to few bits may round the other way, by more than a last digit.
KEPT = ("momentum", "nesterov", "QSGD", "'int", "'bfloat16'")
REVOCABLE = [way for way in WAYS if not any(name in way for name in KEPT)]


@IGNORED
@pytest.mark.parametrize("way", thinned(REVOCABLE, 2))
def test_in_a_large_memory_it_leaves_rounding(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large vectors have no second one: a bad batch is subtracted again. Without bad batches the bits are the same."""
    batches, without = with_and_without(0)
    beside = ps.simulate(lambda rank: run(without, **WAYS[way]), WORKERS)
    monkeypatch.setattr(optimizer, "_LARGE", 0)
    runs, twins = (ps.simulate(lambda rank, b=b: run(b, **WAYS[way]), WORKERS) for b in (batches, without))
    assert all_differences(twins, beside) == [[]] * WORKERS
    tolerance = 1e-2 if way == "bfloat16" else 1e-5  # a last bit of x in 16 bits may fall the other way
    for mine, twin in zip(runs, twins, strict=True):
        assert (mine["skipped"], mine["steps"], mine["skips"]) == (4, twin["steps"], runs[0]["skips"])
        for part in ("x", "vectors"):
            found, expected = mine["state"][part], twin["state"][part]
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
        assert differences(mine["state"]["x"], runs[0]["state"]["x"]) == []  # on all workers


def test_a_million_coordinates_have_no_second_vector() -> None:
    made = [lone(torch.zeros(n, 1), 0.1, ps.TopK(k=5)) for n in ((1 << 20) + 9, 1000)]
    for p, opt in made:
        feed(p, opt, 1.0)
    assert [opt.spare_bytes for _, opt in made] == [0, 4000]


@pytest.mark.parametrize("size", [1e15, 1e25, 3e38])
def test_what_is_huge_is_tried_beside_the_memory(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Squares of it overflow, but nothing else need to: the step is taken, with the bits of a small vector's."""

    def two_steps() -> list[Tensor]:
        p, opt = lone(torch.zeros(40, 40), 1e-3, ps.TopK(k=9))
        feed(p, opt, *[torch.rand(40, 40, generator=torch.Generator().manual_seed(seed)) * size for seed in range(2)])
        return [p.detach(), opt.state[p]["error"].clone(), torch.tensor(opt.skipped)]

    beside = two_steps()
    monkeypatch.setattr(optimizer, "_LARGE", 0)
    assert differences(two_steps(), beside) == []


def test_an_overflow_of_the_sum_is_no_overflow_of_a_gradient() -> None:
    p, opt = lone(torch.zeros(4, 4), 1e-3, ps.Identity())
    feed(p, opt, 3e38)
    assert opt.skipped == 0
    assert torch.equal(p, torch.full((4, 4), -1e-3).mul(3e38))


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40) | st.just([3e38] * 9) | st.just([3e38, -3e38, math.inf]),
)
def test_finite_is_what_every_coordinate_is(values: list[float]) -> None:
    vector = torch.tensor(values)
    assert bool(is_finite(vector)) == all(math.isfinite(v) for v in vector.tolist())


def test_a_step_that_is_taken_begins_the_row_anew() -> None:
    """Also in an optimizer that loads the state, which keeps the row."""
    (p, opt), (q, again) = (lone(torch.ones(5, 5), 0.1, ps.RandomK(0.01), max_skipped=1) for _ in range(2))
    feed(p, opt, math.nan, 1.0, math.nan, 1.0, math.inf, 1.0, math.nan)
    again.load_state_dict(opt.state_dict())
    assert (opt.steps, opt.skipped, again.steps, again.skipped) == (3, 4, 3, 4)
    with pytest.raises(ps.NonFiniteError, match="2 consecutive steps"):
        feed(q, again, math.nan)


def test_it_costs_no_bytes() -> None:
    def moved(most: int | None) -> list[dict[str, Any]]:
        def worker(rank: int) -> dict[str, Any]:
            p, b = nn.Parameter(torch.ones(20, 5)), nn.Parameter(torch.ones(3))
            opt = ps.CompressedSGD([p, b], 0.1, ps.Compression(ps.TopK(k=3), dense_below=10, max_skipped=most))
            for t in range(5):
                p.grad, b.grad = torch.full_like(p, t + rank), torch.ones_like(b)
                opt.step()
            return dict(opt.ledger.by_purpose)

        return ps.simulate(worker, 2)

    with_it, without = moved(20), moved(None)
    for found, bare in zip(with_it, without, strict=True):
        # Only what is compared at the start says more with it: its own value.
        assert {k: v for k, v in found.items() if k != "start"} == {k: v for k, v in bare.items() if k != "start"}
