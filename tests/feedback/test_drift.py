"""Workers whose parameters are no longer equal are found out, named, and stopped or repaired."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_runs import SEVERAL, batches, network, train, wrapped
from hypothesis import given
from hypothesis import strategies as st
from specs import folded
from torch import Tensor, nn

from lab.runs.job import Job
from lab.runs.templates import TASKS
from packsaddle import (
    CompressedSGD,
    Compression,
    DriftError,
    Escape,
    Identity,
    RandomK,
    TopK,
    register_ddp_hook,
    simulate,
)
from packsaddle.comm.group import resolve
from packsaddle.errors import ConfigError
from packsaddle.feedback.checks import fingerprint

Gloo = Callable[..., list[Any]]


@given(
    st.integers(1, 67),
    st.integers(0, 9),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.integers(0, 10**6),
)
def test_any_single_bit_changes_a_fingerprint_and_a_place_in_memory_does_not(
    n: int, start: int, dtype: torch.dtype, seed: int
) -> None:
    base = torch.randn(n + start, generator=torch.Generator().manual_seed(seed)).to(dtype)
    tensor = base[start:]
    before = fingerprint(tensor)
    assert torch.equal(before, fingerprint(tensor.clone()))
    expected = int.from_bytes(bytes(0), "little")
    raw = tensor.clone().view(torch.uint8).tolist()
    raw += [0] * (-len(raw) % 8)
    for i in range(0, len(raw), 8):
        expected += int.from_bytes(bytes(raw[i : i + 8]), "little", signed=True)
    assert (int(before) - expected) % 2**64 == 0  # by hand
    data = tensor.clone().view(torch.uint8)
    data[seed % len(data)] ^= 1 << (seed % 8)
    assert not torch.equal(before, fingerprint(data.view(dtype)))


def test_memory_formats_are_of_one_tensor() -> None:
    t = torch.randn(2, 3, 4, 5)
    assert torch.equal(fingerprint(t), fingerprint(t.to(memory_format=torch.channels_last)))


def run(changed: dict[int, int], **options: Any) -> dict[str, Any]:
    """Worker w finds a bit of its second tensor flipped after step changed[w]."""
    rank = resolve(None).rank
    start = torch.Generator().manual_seed(0)
    weights = [("first", nn.Parameter(torch.randn(6, 5, generator=start))), ("second", nn.Parameter(torch.ones(4, 5)))]
    opt = CompressedSGD(
        weights, 0.1, **folded({"compressor": TopK(k=3), "dense_below": 0, "compare_every": 4} | options)
    )
    message = ""
    try:
        for t in range(21):
            rng = torch.Generator().manual_seed(10 * t + rank)
            for _, w in weights:
                w.grad = w.detach() - torch.randn(w.shape, generator=rng)
            opt.step()
            if changed.get(rank) == t:
                weights[1][1].data.view(-1).view(torch.int32)[7] ^= 1
    except DriftError as error:
        message = str(error)
    found = [(d.step, d.name, d.workers) for d in opt.drifts]
    moved = opt.ledger.by_purpose.get("guard")
    return {
        "message": message,
        "found": found,
        "x": [w.detach().clone() for _, w in weights],
        "steps": opt.steps,
        "sent": 0 if moved is None else moved.sent,
        "anchor": [opt.state[w].get("start", torch.zeros(0)).clone() for _, w in weights],
    }


WAYS: dict[str, dict[str, Any]] = {
    "TopK": {},
    "RandomK": {"compressor": RandomK(0.2)},
    "uncompressed": {"compressor": Identity()},
    "two-way": {"exchange": "two-way"},
    "ef21": {"memory": "ef21"},
    "escape": {"escape": Escape(100, 1e9, lambda: 0.0)},
    "momentum": {"momentum": 0.9},
    "bfloat16 messages": {"compressor": TopK(k=3, values="bfloat16")},
}


@pytest.mark.parametrize("way", WAYS)
def test_workers_that_are_equal_are_left_alone(way: str) -> None:
    results = simulate(lambda rank: run({}, **WAYS[way]), 3)
    assert [(r["message"], r["found"], r["steps"]) for r in results] == [("", [], 21)] * 3
    if way == "TopK":
        assert {r["sent"] for r in results} == {5 * 16 * 2}  # five comparisons of two numbers with two others


@pytest.mark.parametrize("way", list(WAYS))
def test_one_flipped_bit_is_named_on_all_workers(way: str) -> None:
    for result in simulate(lambda rank: run({2: 9}, **WAYS[way]), 3):
        assert result["found"] == [(11, "second", (2,))]
        assert result["message"].startswith("after step 11: worker 2 differs from worker 0 in second. Find the cause")
        assert result["steps"] == 12


class Compared:
    """CompressedSGD on a weight, compared every five steps."""

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.ones(6, 5))
        self.opt = CompressedSGD([self.weight], 0.1, Compression(TopK(k=3), dense_below=0, compare_every=5))

    def go(self, first: int, last: int) -> None:
        for t in range(first, last):
            self.weight.grad = self.weight.detach() - (t + resolve(None).rank)
            self.opt.step()

    def load(self, state: dict[str, Any], weight: Tensor) -> None:
        self.opt.load_state_dict(state)
        self.weight.data.copy_(weight)


def test_a_state_loaded_back_is_compared_as_soon() -> None:
    def work(rank: int) -> list[int]:
        one = Compared()
        one.go(0, 3)
        state, weight = copy.deepcopy(one.opt.state_dict()), one.weight.detach().clone()
        one.go(3, 18)
        one.load(state, weight + rank)
        with pytest.raises(DriftError):
            one.go(3, 18)
        return [drift.step for drift in one.opt.drifts]

    assert simulate(work, 2) == [[4], [4]]


def test_several_workers_are_named() -> None:
    for result in simulate(lambda rank: run({1: 1, 3: 2}), 4):
        assert result["message"].startswith("after step 3: workers 1, 3 differ from worker 0 in second")


@pytest.mark.parametrize("way", WAYS)
def test_a_repair_copies_worker_0(way: str) -> None:
    results = simulate(lambda rank: run({2: 8}, on_drift="repair", **WAYS[way]), 3)
    for result in results:
        assert result["message"] == ""
        assert len(result["found"]) == 1
        assert all(torch.equal(a, b) for a, b in zip(result["x"], results[0]["x"], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(result["anchor"], results[0]["anchor"], strict=True))


def unlike(what: str, from_step: int, until: int, way: str) -> tuple[str, int]:
    """Worker 1 has another rate or noise at some steps."""
    rank = resolve(None).rank

    def is_other(t: int) -> bool:
        return rank == 1 and from_step <= t < until

    def noise(t: int) -> float:
        return 0.1 if what == "noise" and is_other(t) else 0.2

    start = torch.Generator().manual_seed(0)
    w = nn.Parameter(torch.randn(20, 5, generator=start))
    groups = [{"params": [w]}, {"params": [nn.Parameter(torch.ones(4, 5))]}]
    options = {"compressor": TopK(k=3), "dense_below": 0, "compare_every": 4, "on_drift": "repair", **WAYS[way]}
    opt = CompressedSGD(groups, 0.1, **folded(options), noise=noise)
    try:
        for t in range(20):
            for group in opt.param_groups:
                for p in group["params"]:
                    p.grad = p.detach().clone()
            if what != "noise":
                opt.param_groups[1][what] = 0.05 if is_other(t) else 0.1
            opt.step()
    except DriftError as error:
        return str(error), opt.steps
    return "", opt.steps


@pytest.mark.parametrize("way", ["TopK", "two-way", "momentum"])
@pytest.mark.parametrize("what", ["noise", "lr", "weight_decay"])
def test_rates_that_come_to_differ_are_named_within_compare_every_steps(what: str, way: str) -> None:
    named = "noise is 0.1, not 0.2" if what == "noise" else f"{what} of parameter group 1 is 0.05, not 0.1"
    expected = (
        "worker 1 differs from worker 0 in learning rates, weight decay or noise, which must be the same on all "
        f"workers at every step: {named}"
    )
    for message, steps in simulate(lambda rank: unlike(what, 5, 99, way), 3):
        assert message.endswith(expected)
        assert 6 <= steps <= 5 + 4
    if way == "TopK":
        for message, steps in simulate(lambda rank: unlike(what, 5, 6, way), 3):
            assert message.endswith("not in this step, but in one since the last comparison")
            assert steps == 8
        assert simulate(lambda rank: unlike(what, 99, 99, way), 3) == [("", 20)] * 3


def hooked_with_unlike_noise() -> tuple[str, int]:
    model = wrapped(network(torch.float32), SEVERAL)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    rank = resolve(None).rank
    spec = Compression(TopK(0.05), dense_below=100, compare_every=4)
    hook = register_ddp_hook(model, spec, noise=lambda t: 0.1 + 0.1 * (t >= 5) * rank)
    message = ""
    try:
        train(model, optimizer, batches(12, torch.float32))
    except RuntimeError as error:
        message = str(error)
    for thread in hook._background._threads:
        thread.join()
    return message, hook.steps


def test_noise_that_differs_behind_ddp_is_named(gloo: Gloo) -> None:
    for message, steps in gloo(hooked_with_unlike_noise, 2):
        assert "after step 7: worker 1 differs from worker 0 in learning rates, weight decay or noise" in message
        assert "noise is 0.2, not 0.1" in message
        assert steps == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare_every": -1}, "compare_every must be an integer of at least 0, got -1"),
        ({"on_drift": "ignore"}, "on_drift must be one of stop, repair, got 'ignore'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Compression(RandomK(0.01), **options)


# ---- what is compared at the start


def made(what: str) -> str:
    rank = resolve(None).rank
    odd = rank == 1
    shape = (4, 6) if what == "shape" and odd else (6, 4)
    dtype = torch.float64 if what == "dtype" and odd else torch.float32
    names = ["a", "renamed" if what == "name" and odd else "b"]
    weights: list[tuple[str, Tensor]] = [(name, nn.Parameter(torch.ones(shape, dtype=dtype))) for name in names]
    if what == "one more" and odd:
        weights.append(("c", nn.Parameter(torch.ones(0, 4, dtype=dtype))))
    try:
        CompressedSGD(weights, 0.1, Compression(RandomK(0.01), dense_below=0), seed=int(what == "seed" and odd))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("shape", "params[0]='a [6, 4] torch.float32' and worker 1 has params[0]='a [4, 6] torch.float32'"),
        ("dtype", "params[0]='a [6, 4] torch.float32' and worker 1 has params[0]='a [6, 4] torch.float64'"),
        ("name", "params[1]='b [6, 4] torch.float32' and worker 1 has params[1]='renamed [6, 4] torch.float32'"),
        ("one more", "worker 1 has params[2]='c [0, 4] torch.float32'"),
        ("seed", "seed=0 and worker 1 has seed=1"),
    ],
)
def test_the_first_difference_is_named_at_the_start(what: str, named: str) -> None:
    for message in simulate(lambda rank: made(what), 3):
        assert named in message


def of_another_version() -> str:
    from packsaddle.comm import communicator

    communicator.__version__ = f"0.{resolve(None).rank}.0"
    return made("nothing")


def test_another_version_is_refused(gloo: Gloo) -> None:
    for message in gloo(of_another_version, 2):
        assert "packsaddle='0.0.0' and worker 1 has packsaddle='0.1.0'" in message


def of_unlike_configurations(out: str) -> str:
    config = replace(TASKS["digits"].config, lr=0.1 + 0.1 * resolve(None).rank)
    try:
        Job((config,), (Path(out),)).claim(ExitStack())
    except ConfigError as error:
        return str(error)
    return ""


def test_unlike_configurations_are_refused_before_anything_is_made(gloo: Gloo, tmp_path: Path) -> None:
    expected = "all workers must have the same configuration, but lr is 0.1 for worker 0 and 0.2 for worker 1"
    assert gloo(of_unlike_configurations, 2, str(tmp_path / "run")) == [expected] * 2
    assert not (tmp_path / "run").exists()
