"""Gradients that are finite, and what is made of them would not be: such a step leaves no trace either."""

import math
from typing import Any

import pytest
import torch
from fronts import differences
from nightly import thinned
from problems import feed, lone
from specs import folded
from test_nonfinite import COMPRESSORS
from torch import Tensor, nn

from packsaddle import CompressedSGD, Identity, Noise, RandomK, TopK, simulate
from packsaddle.comm.group import resolve
from packsaddle.numerics.finite import is_in_range, magnitude

STEPS, HUGE = 8, (2, 3, 6)
KINDS = ("all alike", "mixed signs", "one worker")
pytestmark = pytest.mark.filterwarnings("ignore:.*compress.*:UserWarning")


def gradients(shapes: list[torch.Size], step: int, kind: str) -> list[Tensor]:
    """A step's gradients: at some steps 3e38 in every coordinate."""
    rng = torch.Generator().manual_seed(100 * step + resolve(None).rank)
    found = [torch.randn(shape, generator=rng) for shape in shapes]
    if step in HUGE and (kind != "one worker" or resolve(None).rank == 0):
        found = [3e38 * (g.sign() if kind == "mixed signs" else torch.ones_like(g)) for g in found]
    return found


def optimizer_run(kind: str, *, has_them: bool, **options: Any) -> dict[str, Any]:
    rng = torch.Generator().manual_seed(7)
    weights = [nn.Parameter(torch.randn(shape, generator=rng)) for shape in ((6, 5), (9,), (4, 7))]
    opt = CompressedSGD(weights, 1.0, **folded({"dense_below": 12, "noise": 0.01, "seed": 5} | options))
    for step in range(STEPS):
        if step in HUGE and not has_them:
            continue
        for w, g in zip(weights, gradients([w.shape for w in weights], step, kind), strict=True):
            w.grad = g
        opt.step()
    state = opt.state_dict()
    vectors = {i: {name: v.clone() for name, v in of.items()} for i, of in state["state"].items()}
    x = [w.detach().clone() for w in weights]
    return {
        "state": {"x": x, "noise": state["noise"], "aggregator": state["aggregator"], "vectors": vectors},
        "steps": opt.steps,
        "skips": [(s.index, s.workers) for s in opt.skips],
        "finite": all(bool(v.isfinite().all()) for v in [*x, *(v for of in vectors.values() for v in of.values())]),
    }


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_that_overflows_is_forgotten_where_it_is_not_sent(nesterov: bool) -> None:
    """Each gradient is finite, and so is its sum with e; the momentum of the first five alone is not."""
    weight, opt = lone(torch.ones(100, 100), 1e-30, RandomK(0.01), momentum=0.9, nesterov=nesterov)
    huge = torch.full_like(weight, 1e-3)
    huge[0, 0] = 1e38
    feed(weight, opt, *[huge] * 5, *[1e-3] * 7)
    assert 0 < opt.skipped < 5
    vectors = [v for v in opt.state_dict()["state"][0].values() if isinstance(v, Tensor)]
    assert all(bool(v.isfinite().all()) for v in vectors)


VARIANTS: dict[str, dict[str, Any]] = {
    "two-way": {"compressor": TopK(k=5), "exchange": "two-way"},
    "coordinator, random back": {"compressor": TopK(k=5), "exchange": "coordinator", "back": RandomK(0.2)},
    "lazy noise": {"compressor": RandomK(0.2), "noise": 0.1},
    "momentum": {"compressor": TopK(k=5), "momentum": 0.9},
    "int8": {"compressor": TopK(k=5, values="int8")},
}


@pytest.mark.parametrize(("workers", "kind"), [(1, "all alike"), *((2, kind) for kind in KINDS)])
@pytest.mark.parametrize("way", thinned([*COMPRESSORS, *VARIANTS], 2))
def test_a_huge_batch_leaves_no_trace(way: str, workers: int, kind: str) -> None:
    options = VARIANTS.get(way) or {"compressor": COMPRESSORS[way]}
    mine, twin = (
        simulate(lambda rank, h=has_them: optimizer_run(kind, has_them=h, **options), workers)
        for has_them in (True, False)
    )
    whose = (0,) if kind == "one worker" else tuple(range(workers))
    for run, other in zip(mine, twin, strict=True):
        assert differences(run["state"], other["state"]) == []
        assert run["finite"]
        assert run["skips"] == [(2, whose), (2, whose), (4, whose)]
        assert run["steps"] == STEPS - len(HUGE)


# ---- where every worker's vector can be used, and the mean or x cannot take it


def in_crowds(rank: int) -> tuple[float, list[tuple[tuple[int, ...], str]], float]:
    p, opt = lone(torch.ones(1, 1), 1.0, Identity())
    feed(p, opt, 1.0, 5e36, 2.0)
    return p.item(), [(s.workers, s.parameter) for s in opt.skips], opt.state_dict()["state"][0]["error"].item()


@pytest.mark.slow
def test_a_sum_over_workers_that_overflows_is_left_out_by_all() -> None:
    """Of 70 workers with 5e36 each the sum is 3.5e38, and the mean is made of the sum."""
    expected = (1.0 - 1.0 - 2.0, [((), "a mean of finite gradients")], 0.0)
    assert simulate(in_crowds, 70) == [expected] * 70


def test_x_never_overflows_however_far_it_has_gone() -> None:
    """By hand: 2^121 a step, 127 times, is 2^128 - 2^121; once more is 2^128, which float32 has not."""
    p, opt = lone(torch.zeros(1, 1), 1.0, Identity(), max_skipped=50)
    feed(p, opt, *[-(2.0**121)] * 140)
    assert p.item() == 2.0**128 - 2.0**121
    assert (opt.steps, opt.skipped) == (127, 13)
    feed(p, opt, 2.0**120)
    assert p.item() == 2.0**128 - 2.0**121 - 2.0**120


@pytest.mark.parametrize("shape", [(40, 40), (1100, 1000)])  # the memory of the second is changed in place
def test_weight_decay_of_a_huge_parameter_leaves_e_finite(shape: tuple[int, int]) -> None:
    x = torch.zeros(shape)
    x[0, 0] = 1e38
    p, opt = lone(x, 0.1, TopK(0.01), weight_decay=100.0)
    feed(p, opt, 1.0, 1.0)
    assert (opt.steps, opt.skipped) == (0, 2)
    assert bool(opt.state_dict()["state"][0]["error"].isfinite().all())
    p.data[0, 0] = 1.0
    opt.load_state_dict(opt.state_dict())
    feed(p, opt, 1.0)
    assert opt.steps == 1


def test_nor_by_outstanding_noise() -> None:
    """What was drawn for a step that x could not take is outstanding again."""
    start, first = torch.ones(40, 1), (torch.arange(40) < 4).float()[:, None]
    start[:20] = 3.4e38

    def run(*sizes: float) -> tuple[Tensor, Any]:
        p, opt = lone(start, 1.0, RandomK(1.0), noise=Noise(0.5, lazy=True), seed=1)
        feed(p, opt, *[size * first for size in sizes])
        assert opt.skipped == len(sizes) - 1
        return p.detach(), opt.state_dict()["noise"]

    assert differences(run(-1e36, 1.0), run(1.0)) == []


def owner(rank: int) -> tuple[int, int, bool]:
    """The reply keeps one coordinate of eight, so the owner's error of the others grows from step to step."""
    back, large = RandomK(k=1, block_size=1), 3e38 * torch.eye(8)[:, 3:4]
    p, opt = lone(torch.zeros(8, 1), 1e-3, TopK(k=1), exchange="coordinator", back=back, max_skipped=300)
    feed(p, opt, *[large] * 200)
    return opt.steps, opt.skipped, all(bool(v.isfinite().all()) for v in (p.detach(), opt.state[p]["error"]))


def test_an_owner_whose_error_has_grown_too_large_tells_all() -> None:
    found = simulate(owner, 2)
    assert found[0] == found[1]
    assert found[0][2]
    assert found[0][1] > 0


def test_bounds_hold() -> None:
    largest = torch.finfo(torch.float32).max
    assert bool(is_in_range(torch.full((4,), largest / 64 / 4)))
    assert not bool(is_in_range(torch.full((5,), largest / 64 / 4)))
    assert bool(is_in_range(torch.full((5000,), 1e30, dtype=torch.bfloat16)))
    assert bool(is_in_range(torch.zeros(0)))
    for value in (math.nan, math.inf, -math.inf):
        assert not bool(is_in_range(torch.tensor([1.0, value])))
        assert not math.isfinite(float(magnitude(torch.tensor([1.0, value]))))
    for vector in ([3.0, -4.0], [3e38, -3e38, 1.0], [1e-10, 0.0], [0.0]):
        found = float(magnitude(torch.tensor(vector)))
        assert max(map(abs, vector)) * (1 - 1e-6) <= found < math.inf
