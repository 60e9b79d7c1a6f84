"""The pool of worker processes: what it keeps between calls, and what not."""

import os
import signal
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo import run_in_processes

import packsaddle

Gloo = Callable[..., list[Any]]
seen: list[str] = []


def present() -> tuple[int, int, float]:
    """Return this process, its rank, and the sum of all ranks, which takes a group."""
    ranks = torch.tensor(float(dist.get_rank()))
    dist.all_reduce(ranks)
    return os.getpid(), dist.get_rank(), float(ranks)


def pids(gloo: Gloo, workers: int) -> list[int]:
    found = gloo(present, workers)
    assert [rank for _, rank, _ in found] == list(range(workers))
    assert {total for *_, total in found} == {workers * (workers - 1) / 2}
    return [pid for pid, *_ in found]


def test_workers_stay_and_more_join_them(gloo: Gloo) -> None:
    two, three, one = pids(gloo, 2), pids(gloo, 3), pids(gloo, 1)
    assert (three[:2], three[:1]) == (two, one)
    assert len({*three, os.getpid()}) == 4
    assert gloo(present, 1, fresh=True)[0][0] not in three
    assert pids(gloo, 3) == three


def fail(how: str) -> None:
    """Rank 1 fails while the others wait for it."""
    if dist.get_rank() == 1:
        if how == "raise":
            raise ValueError("this batch is bad")
        if how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "ValueError: this batch is bad"),
        ("die", "worker 1 died with exit code -9"),
        ("hang", r"workers \[0, 1\] have given no result within 3 s"),
    ],
)
def test_after_a_failure_there_are_new_workers(gloo: Gloo, tmp_path: Path, how: str, message: str) -> None:
    before = pids(gloo, 2)
    with pytest.raises(AssertionError, match=message):
        run_in_processes(fail, 2, tmp_path, how, timeout=3 if how == "hang" else 120)
    assert not set(before) & set(pids(gloo, 2))


def state() -> dict[str, Any]:
    """Return the global state that a test could depend on."""
    with torch.device("cpu"):
        draw = torch.rand(3)
    return {
        "draw": draw.tolist(),
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.empty(1).device),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "filters": [str(f) for f in warnings.filters if f[0] == "error"],  # modules add others as they are imported
        "environment": os.environ.get("PACKSADDLE_KERNELS"),
        "folder": os.getcwd(),
        "handler": str(signal.getsignal(signal.SIGTERM)),
        "seen": list(seen),
        "group": dist.group.WORLD.group_name,  # type: ignore[union-attr]
        "groups": len(dist.distributed_c10d._world.pg_map),
    }


def spoil() -> int:
    """Change all of it."""
    torch.manual_seed(5)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(2)
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("error")
    os.environ["PACKSADDLE_KERNELS"] = "torch"
    os.chdir("/")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    seen.append("spoilt")
    dist.new_group([0])
    return os.getpid()


def test_a_call_finds_nothing_of_the_one_before(gloo: Gloo) -> None:
    """What it finds is what a process that has run nothing finds."""
    pristine = gloo(state, 2, fresh=True)
    assert pristine[0]["seen"] == []
    spoilt = gloo(spoil, 2)
    assert gloo(state, 2) == pristine
    assert pids(gloo, 2) == spoilt


def stay() -> int:
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    return os.getpid()


def patch() -> int:
    packsaddle.comm.group.TorchGroup.all_reduce = lambda self, tensor: None  # type: ignore[method-assign]
    return os.getpid()


def patch_module() -> int:
    packsaddle.comm.group.resolve = None
    return os.getpid()


@pytest.mark.parametrize("leave", [stay, patch, patch_module])
def test_what_cannot_be_undone_ends_the_workers(gloo: Gloo, leave: Callable[[], int]) -> None:
    before = gloo(leave, 1)
    assert pids(gloo, 1) != before
