"""A step with a non-finite gradient on one worker leaves no trace: the run is one in which its batch never existed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from ddp_runs import WAYS as COMPRESSORS
from fronts import FRONTS, differences, made, parameters_of

from packsaddle import QSGD, RandomK, TopK
from packsaddle.comm.group import resolve

BAD = (3, 4, 8)


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=3e-3)


# Every compressor and exchange, and each kind of optimizer. CompressedSGD's further ways: tests/sgd/test_nonfinite.py,
# test_overflow.py.
HOOKED = {
    name: {"noise": 0.01, "monitor_every": 1, **options, **({"inner": inner} if inner else {})}
    for (name, options), inner in zip(COMPRESSORS.items(), (None, momentum, adamw) * 5, strict=False)
}
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "CompressedSGD": {"RandomK": {"compressor": RandomK(0.1), "noise": 0.01}, "two-way": {"exchange": "two-way"}},
    "DDP by buckets": {name: HOOKED[name] for name in ("RandomK", "TopK", "QSGD", "LowRank", "two-way")},
    "DDP by model": HOOKED,
    "FSDP": {
        "two-way, AdamW": {"compressor": TopK(0.1), "exchange": "two-way", "monitor_every": 1, "inner": adamw},
        "QSGD": {"compressor": QSGD(), "noise": 0.01},
    },
}


# What multiplies a row of the gradient, and on which of two workers: the last are finite, and too large to compress.
INVALID = ((math.nan, (1,)), (math.inf, (1,)), (1.7e308, (1,)), (1.7e308, (0, 1)))


def trained(front: str, way: str, value: float, whose: tuple[int, ...], has_them: bool) -> dict[str, Any]:
    one = made(front, **WAYS[front][way])
    for t in range(10):
        if t not in BAD:
            one.step(t)
        elif has_them:
            one.step(t, value if resolve(None).rank in whose else None)
    state = one.everything()
    for part in ("engine", "optimizer"):
        state[part] = {k: v for k, v in state[part].items() if k not in ("skips", "guard", "ledger")}  # they count them
    skips = [(s.index, s.workers) for s in one.engine.skips]
    return {"state": state, "steps": one.engine.steps, "skips": skips, "skipped": one.engine.skipped}


def with_and_without(
    front: str, way: str, value: float, whose: tuple[int, ...]
) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    mine, twin = (trained(front, way, value, whose, has_them) for has_them in (True, False))
    return differences(mine.pop("state"), twin.pop("state")), mine, twin


@parameters_of(WAYS, 2)
def test_a_bad_batch_leaves_no_trace(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    """Of one layer, reduced after others. A hook names its own worker alone, for a collective could hang there."""
    value, whose = INVALID[list(WAYS[front]).index(way) % len(INVALID)]
    for rank, (differ, mine, twin) in enumerate(on_workers(with_and_without, front, way, value, whose)):
        assert differ == []
        named = tuple(worker for worker in whose if worker == rank or not FRONTS[front].processes)
        assert mine == {"steps": 7, "skips": [(3, named), (3, named), (6, named)], "skipped": 3}
        assert twin == {"steps": 7, "skips": [], "skipped": 0}


def gives_up(front: str, way: str) -> tuple[str, bool, int, bool]:
    one = made(front, compressor=TopK(0.1), max_skipped=2)
    every = 1 if front in WAYS else 7  # steps in which local updates have a round at least; no exchange is pending
    for t in range(2 * every):
        one.step(t)
    x, message = one.x(), ""
    try:
        for t in range(9 * every):
            one.step(t, math.nan if resolve(None).rank == 1 else None)
    except RuntimeError as error:
        message = str(error)
        one.end()
    same, skipped = torch.equal(one.x(), x), one.engine.skipped
    one.engine.reset_skip_streak()
    if front == "FSDP":  # a model whose backward pass has raised keeps whole parameters
        return message, same, skipped, True
    for t in range(9 * every, 11 * every):
        one.step(t)
    return message, same, skipped, not torch.equal(one.x(), x)


@parameters_of({front: ["TopK"] for front in FRONTS})
def test_too_many_in_a_row_stop_all_workers(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    """With x as it was, or the anchor."""
    for message, same, skipped, moves_on in on_workers(gives_up, front, way):
        assert "max_skipped=2" in message
        assert same or front == "local overlapped"  # whose other fragment has rounds of its error memory between
        assert skipped >= 3
        assert moves_on
