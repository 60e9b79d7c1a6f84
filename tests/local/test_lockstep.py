"""Workers that make different calls, or after unequal numbers of steps: all of them are told, in real processes."""

import logging
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_python import environment, python
from specs import local_options

from packsaddle import (
    QSGD,
    Compression,
    Compressor,
    LocalUpdates,
    Rounded,
    Sign,
    TopK,
    load_checkpoint,
    save_checkpoint,
    simulate,
)
from packsaddle.compressors import describe

Gloo = Callable[..., list[Any]]


def made(every: int, compressor: Any = Sign(), **options: Any) -> tuple[Any, torch.optim.Optimizer, LocalUpdates]:  # noqa: B008 -- immutable
    x = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = torch.optim.SGD([x], lr=0.1)
    given = {"compressor": compressor, "dense_below": 0} | options
    return x, optimizer, LocalUpdates(optimizer, every=every, **local_options(**given))


def train(steps: int, x: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x.grad = torch.randn(x.shape, generator=rng)
        optimizer.step()


def message(call: Callable[[], Any]) -> str:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        call()
    return str(caught.value)


def unequal(compressor: Compressor, delay: int) -> str:
    """12 steps on worker 0 and 10 on worker 1, then a flush."""
    worker = torch.distributed.get_rank()
    x, optimizer, local = made(4, compressor, delay=delay)
    return message(lambda: (train(12 - 2 * worker, x, optimizer, worker), local.flush()))


@pytest.mark.parametrize(("compressor", "delay"), [(Sign(), 0), (TopK(0.1), 0), (TopK(0.1), 3)], ids=str)
def test_unequal_numbers_of_steps(compressor: Compressor, delay: int, gloo: Gloo) -> None:
    """Without the check gloo aborts a process, or both wait; of TopK sizes are exchanged before."""
    expected = "worker 0 exchanges a round after step 12, and worker 1 calls flush() after step 10: all workers"
    for found in gloo(unequal, 2, compressor, delay):
        assert expected in found


def a_scaler_skips() -> str:
    """GradScaler leaves step 3 out on worker 1, and LocalUpdates is not given it."""
    worker = torch.distributed.get_rank()
    x, optimizer, local = made(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def run() -> None:
        rng = torch.Generator().manual_seed(worker)
        for n in range(1, 13):
            optimizer.zero_grad()
            factor = torch.inf if (n, worker) == (3, 1) else 1
            scaler.scale((x * torch.randn(x.shape, generator=rng)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
        local.flush()

    return message(run)


def test_a_step_that_a_scaler_skips_on_one_worker(gloo: Gloo) -> None:
    for found in gloo(a_scaler_skips, 2):
        assert "worker 0 exchanges a round after step 12, and worker 1 calls flush() after step 11" in found
        assert "pass scaler= if a GradScaler skips steps" in found


def equal_rounds() -> tuple[bool, torch.Tensor, list[str]]:
    worker, said = torch.distributed.get_rank(), list[str]()
    x, optimizer, local = made(8)
    train(12 - 2 * worker, x, optimizer, worker)
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("packsaddle").addHandler(handler)
    local.error()
    taken = local.flush()
    logging.getLogger("packsaddle").removeHandler(handler)
    return taken, x.detach(), said


def test_unequal_steps_of_equal_rounds_are_well_defined(gloo: Gloo) -> None:
    """And worker 0 says so, once."""
    (taken, x, said), (taken2, x2, said2) = gloo(equal_rounds, 2)
    assert taken
    assert taken2
    assert torch.equal(x, x2)
    (line,) = said
    assert "worker 0 calls error() after step 12, and worker 1 calls error() after step 10" in line
    assert said2 == []


CALLS = {
    "flush": ("calls flush() after step 3", lambda local, step: local.flush()),
    "error": ("calls error() after step 3", lambda local, step: local.error()),
    "average": ("calls average() after step 3", lambda local, step: local.average([torch.zeros(2)])),
    "step": ("exchanges a round after step 4", lambda local, step: step()),
}


@pytest.mark.parametrize(
    "calls", [("flush", "error"), ("error", "flush"), ("error", "step"), ("average", "flush")], ids=" and ".join
)
def test_unlike_calls(calls: tuple[str, str]) -> None:
    def body(worker: int) -> str:
        x, optimizer, local = made(2)
        train(3, x, optimizer, worker)
        return message(lambda: CALLS[calls[worker]][1](local, lambda: train(1, x, optimizer, 9)))

    first, second = (CALLS[call][0] for call in calls)
    for found in simulate(body, 2):
        assert f"worker 0 {first}, and worker 1 {second}: all workers must make the same calls" in found


@pytest.mark.parametrize("call", ["calls flush()", "saves a checkpoint", "loads a checkpoint"])
def test_a_call_on_one_worker_before_the_first_step(call: str, tmp_path: Path) -> None:
    """As by `if rank == 0: save_checkpoint(...)`. Its collectives would meet those of the other's first step."""

    def body(worker: int) -> str:
        x, optimizer, local = made(2)
        parts, sent = {"optimizer": optimizer, "local": local}, local.ledger.total.sent
        save_checkpoint(tmp_path, parts, step=0)
        assert local.ledger.total.sent == sent
        calls: dict[str, Callable[[], object]] = {
            "calls flush()": local.flush,
            "saves a checkpoint": lambda: save_checkpoint(tmp_path, parts, step=1),
            "loads a checkpoint": lambda: load_checkpoint(tmp_path, parts),
        }
        return message(lambda: train(2, x, optimizer, worker) if worker else calls[call]())

    for found in simulate(body, 2):
        assert f"worker 0 {call} after step 0, and worker 1 checks its first step after step 1: all workers" in found


def test_a_header_is_32_bytes() -> None:
    def body(worker: int) -> int:
        x, optimizer, local = made(4)
        train(12, x, optimizer, worker)
        return local.ledger.by_purpose["guard"].sent

    assert simulate(body, 3) == [2 * 32 * (1 + 3)] * 3  # before the check of the first step, and each of three rounds


EXITS = """
import sys
import torch
import torch.distributed as dist
from packsaddle import LocalUpdates

rank, alone = int(sys.argv[1]), sys.argv[3]
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x = torch.nn.Parameter(torch.zeros(40, 50))
optimizer = torch.optim.SGD([x], lr=0.1)
if rank or alone != "LocalUpdates":
    local = LocalUpdates(optimizer, every=4)
rng = torch.Generator().manual_seed(rank)
for _ in range(10 + 3 * rank):
    x.grad = torch.randn(x.shape, generator=rng)
    optimizer.step()
"""


@pytest.mark.parametrize("alone", ["exchanges a round", "LocalUpdates"])
def test_a_worker_that_has_exited(alone: str, tmp_path: Path) -> None:
    """Worker 1 makes more steps, or the LocalUpdates alone: it names the other, its own step, and remedies."""
    found = [
        subprocess.Popen(
            [python(), "-c", EXITS, str(rank), str(tmp_path / "store"), alone],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=100)[1] for process in found]
    assert [process.returncode for process in found] == [0, 1]
    last = said[1].strip().splitlines()[-1]
    assert "PeerLostError: rank 1 of 2 lost rank 0" in last
    if alone == "LocalUpdates":
        assert last.endswith("It waited in LocalUpdates(...), which every worker must call")
        return
    assert "It was when worker 1 exchanges a round after step 12. If worker 1 alone made this call" in last
    assert "if the others ended after fewer steps, make the data equally long" in last


# ---- functions of the round that return a compressor


def unlike_schedules(later: Compressor, first: int) -> str:
    """Worker 1 has another compressor from a round on."""
    worker = torch.distributed.get_rank()

    def run() -> None:
        schedule = Compression(lambda t: later if worker == 1 and t >= first else QSGD(7), exchange="direct")
        x, optimizer, _ = made(2, schedule)
        train(8, x, optimizer, worker)

    return message(run)


@pytest.mark.parametrize("later", [QSGD(3), Rounded()], ids=["other levels", "other size"])
def test_schedules_that_differ(later: Compressor, gloo: Gloo) -> None:
    """Messages of other levels would be averaged wrongly, and those of another size end the process."""
    for worker, found in enumerate(gloo(unlike_schedules, 2, later, 1)):
        assert "workers 0 and 1 have different compressors in the exchange after step 4, on worker" in found
        assert f"on worker {worker} {describe(later if worker else QSGD(7))}: a schedule must depend" in found
    for found in gloo(unlike_schedules, 2, later, 0):
        assert "the same arguments, but worker 0 has compressor of round 0='QSGD()' and worker 1" in found


@dataclass(frozen=True)
class Scaled(Sign):
    """A compressor of one's own, with a field that has no plain value."""

    scale: Callable[[float], float] = float


def own_schedule() -> int:
    x, optimizer, local = made(2, lambda t: Scaled(scale=lambda value: t * value))
    train(4, x, optimizer, torch.distributed.get_rank())
    return local.rounds


def test_a_schedule_of_ones_own_compressors(gloo: Gloo) -> None:
    """A function's repr has its address, which is another one in each process."""
    assert gloo(own_schedule, 2) == [2, 2]
