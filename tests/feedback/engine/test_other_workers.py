"""Another number of workers, on any front: x and y, x less all that is unsent, stay; and workers go on with one x.

Of local updates so do the outer optimizer's state, and the means of the workers' own parameters and moments.

tests/checkpoint/test_reshard.py has what a file may lack. FSDP refuses (tests/hooks/test_fsdp.py).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fronts import Training, flat, made, mean, parameters_of
from torch import Tensor

from packsaddle import QSGD, Identity, OuterSGD, TopK, load_checkpoint, save_checkpoint

COMMON: dict[str, dict[str, Any]] = {
    "TopK": {},
    "two-way": {"exchange": "two-way"},
    "coordinator": {"exchange": "coordinator", "back": TopK(0.2)},
}
FURTHER: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "QSGD": {"compressor": QSGD()},
    "x at the anchor": {"exchange": "two-way", "keep_unsent": False},
    "AdamW, outer": {"inner": torch.optim.AdamW, "outer": OuterSGD(), "mean_momentum": 0.0},
}
WAYS = {
    "CompressedSGD": COMMON | {"momentum": FURTHER["momentum"]},
    "DDP by buckets": COMMON,
    "DDP by model": COMMON,
    "local": COMMON | {name: FURTHER[name] for name in ("QSGD", "x at the anchor", "AdamW, outer")},
    "local, two optimizers": {"two-way": COMMON["two-way"]},
    "local overlapped": COMMON | {name: FURTHER[name] for name in ("x at the anchor", "AdamW, outer")},
}


def parts(one: Training) -> dict[str, Any]:
    if members := getattr(one, "members", []):  # of several optimizers
        return {"model": one.plain, "muon": members[0], "adamw": members[1], "engine": one.engine}
    both = {"optimizer": one.optimizer, "engine": one.engine}
    return {"model": one.plain, **(both if one.engine is not one.optimizer else {"engine": one.engine})}


def of_local(one: Training) -> Tensor:
    """Return the means over workers of the parameters and moments of local updates, and the outer state; collective."""
    if not hasattr(one, "optimizer") or not hasattr(one.engine, "outer"):
        return torch.zeros(0)
    states = [t.double() for state in one.optimizer.state.values() for t in state.values()]
    outer = [] if one.engine.outer is None else [t for state in one.engine.outer.state.values() for t in state.values()]
    return torch.cat([mean(flat([*one.parameters(), *states])), *(t.view(-1) for t in outer)])


def saved(front: str, way: str, folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Save after a step that is between two rounds of local updates, or within the delay of one."""
    one = made(front, **WAYS[front][way])
    for t in range(7):
        one.step(t)
    found = one.x(), one.y(), of_local(one)
    save_checkpoint(folder, parts(one), step=7)
    return found


def carried(front: str, way: str, folder: Path) -> tuple[Tensor, ...]:
    """Return x, y and `of_local` after loading, x after further steps, and of plain local updates after a flush."""
    one = made(front, **WAYS[front][way])
    load_checkpoint(folder, parts(one))
    found = one.x(), one.y(), of_local(one)
    for t in range(7, 13):
        one.step(t)
    later, flushed = one.x(), found[1]
    if front.startswith("local") and "outer" not in WAYS[front][way]:
        load_checkpoint(folder, parts(one))
        assert one.engine.flush(Identity())
        flushed = one.x()
    return *found, later, flushed


OTHERS_SAVED = pytest.mark.filterwarnings("ignore:the checkpoint of step 7 was saved by")


@OTHERS_SAVED
@parameters_of(WAYS, 2)
def test_y_stays_with_a_worker_less(front: str, way: str, on_workers: Callable[..., Any], tmp_path: Path) -> None:
    check(front, way, on_workers, tmp_path, 3, 2)


@OTHERS_SAVED
@parameters_of({"CompressedSGD": COMMON, "DDP by buckets": {"TopK": {}}, "local overlapped": COMMON})
def test_y_stays_with_a_worker_more(front: str, way: str, on_workers: Callable[..., Any], tmp_path: Path) -> None:
    check(front, way, on_workers, tmp_path, 2, 3)


def check(front: str, way: str, on_workers: Callable[..., Any], folder: Path, old: int, new: int) -> None:
    (x, y, others), *_ = on_workers(saved, front, way, folder, workers=old)
    assert (x - y).abs().max() > 1e-6
    found = on_workers(carried, front, way, folder, workers=new)
    for here, corrected, of_this, later, flushed in found:
        torch.testing.assert_close(here, x, rtol=0, atol=1e-12)
        torch.testing.assert_close(corrected, y, rtol=0, atol=1e-12)
        torch.testing.assert_close(of_this, others, rtol=0, atol=1e-12)
        torch.testing.assert_close(flushed, y, rtol=0, atol=1e-12)
        assert torch.equal(later, found[0][3])
        assert (later - x).abs().max() > 1e-3
