"""Workers that make different calls, or after unequal numbers of steps: all of them are told, in real processes."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from specs import local_options

from packsaddle import (
    QSGD,
    Compression,
    Compressor,
    Identity,
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


def made(
    every: int, compressor: Compressor | None = None, **options: Any
) -> tuple[Any, torch.optim.Optimizer, LocalUpdates]:
    kind = Compression(compressor or Sign(), dense_below=0)
    x = torch.nn.Parameter(torch.zeros(40, 50))
    optimizer = torch.optim.SGD([x], lr=0.1)
    return x, optimizer, LocalUpdates(optimizer, every=every, **local_options(compressor=kind, **options))


def train(steps: int, x: Any, optimizer: torch.optim.Optimizer, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x.grad = torch.randn(x.shape, generator=rng)
        optimizer.step()


def message(call: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def unequal(every: int, compressor: Compressor, options: dict[str, Any]) -> str:
    """12 steps on worker 0 and 10 on worker 1, then a flush."""
    worker = torch.distributed.get_rank()
    x, optimizer, local = made(every, compressor, **options)

    def run() -> None:
        train(12 - 2 * worker, x, optimizer, worker)
        local.flush()

    return message(run)


@pytest.mark.parametrize(
    ("compressor", "options"),
    [
        (Sign(), {}),
        (TopK(0.1), {}),  # whose sizes differ
        (Identity(), {}),
        (Sign(), {"delay": 2}),
        (TopK(0.1), {"delay": 3}),
    ],
    ids=str,
)
def test_unequal_numbers_of_steps(compressor: Compressor, options: dict[str, Any], gloo: Gloo) -> None:
    """Without the check gloo aborts a process, or both wait."""
    for found in gloo(unequal, 2, 4, compressor, options):
        assert (
            "worker 0 exchanges a round after step 12, and worker 1 calls flush() after step 10: all workers" in found
        )


def a_scaler_skips() -> str:
    """GradScaler leaves step 3 out on worker 1, and LocalUpdates is not given it."""
    worker = torch.distributed.get_rank()
    x, optimizer, local = made(4)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)

    def run() -> None:
        rng = torch.Generator().manual_seed(worker)
        for n in range(1, 13):
            optimizer.zero_grad()
            scaler.scale(
                (x * torch.randn(x.shape, generator=rng)).sum() * (torch.inf if (n, worker) == (3, 1) else 1)
            ).backward()
            scaler.step(optimizer)
            scaler.update()
        local.flush()

    return message(run)


def a_batch_is_left_out() -> str:
    """As by `if bad: continue`, of step 5 on worker 0."""
    worker = torch.distributed.get_rank()
    x, optimizer, local = made(4)

    def run() -> None:
        for n in range(1, 13):
            if (n, worker) == (5, 0):
                continue
            train(1, x, optimizer, 20 * worker + n)
        local.flush()

    return message(run)


def test_a_step_that_one_worker_leaves_out(gloo: Gloo) -> None:
    for found in gloo(a_scaler_skips, 2):
        assert "worker 0 exchanges a round after step 12, and worker 1 calls flush() after step 11" in found
        assert "pass scaler= if a GradScaler skips steps" in found
    for found in gloo(a_batch_is_left_out, 2):
        assert "worker 0 calls flush() after step 11, and worker 1 exchanges a round after step 12" in found


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


@pytest.mark.parametrize("calls", [("flush", "error"), ("error", "flush"), ("error", "step"), ("flush", "begin")])
def test_unlike_calls(calls: tuple[str, str]) -> None:
    def body(worker: int) -> str:
        x, optimizer, local = made(2)
        if "begin" not in calls:
            train(3, x, optimizer, worker)
        call = {"step": lambda: train(1, x, optimizer, 9), "begin": lambda: train(1, x, optimizer, 9)}
        return message(call.get(calls[worker]) or getattr(local, calls[worker]))

    said = {
        "flush": "calls flush() after step 3",
        "error": "calls error() after step 3",
        "step": "exchanges a round after step 4",
        "begin": "checks its first step after step 1",
    }
    if "begin" in calls:
        said["flush"] = "calls flush() after step 0"
    for found in simulate(body, 2):
        assert (
            f"worker 0 {said[calls[0]]}, and worker 1 {said[calls[1]]}: all workers must make the same calls" in found
        )


def test_a_header_is_40_bytes() -> None:
    def body(worker: int) -> int:
        x, optimizer, local = made(4)
        train(12, x, optimizer, worker)
        return local.ledger.by_purpose["guard"].sent

    assert simulate(body, 3) == [2 * 40 * (1 + 3)] * 3  # before the check of the first step, and each of three rounds


def unlike_schedules(later: Compressor, first: int) -> str:
    """Worker 1 has another compressor from a round on."""
    worker = torch.distributed.get_rank()

    def run() -> None:
        x = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = torch.optim.SGD([x], lr=0.1)
        schedule = Compression(lambda t: later if worker == 1 and t >= first else QSGD(7), exchange="direct")
        LocalUpdates(optimizer, schedule, every=2)
        train(8, x, optimizer, worker)

    with pytest.raises((RuntimeError, ValueError)) as caught:
        run()
    return str(caught.value)


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
    x = torch.nn.Parameter(torch.zeros(64, 64))
    optimizer = torch.optim.SGD([x], lr=0.1)
    local = LocalUpdates(optimizer, lambda t: Scaled(scale=lambda value: t * value), every=2)
    train(4, x, optimizer, torch.distributed.get_rank())
    return local.rounds


def test_a_schedule_of_ones_own_compressors(gloo: Gloo) -> None:
    """A function's repr has its address, which is another one in each process."""
    assert gloo(own_schedule, 2) == [2, 2]


@pytest.mark.parametrize("call", ["saves", "loads"])
def test_a_checkpoint_on_one_worker_alone(call: str, tmp_path: Path) -> None:
    """As by `if rank == 0: save_checkpoint(...)`. Its collectives would meet those of the other's round."""

    def body(worker: int) -> str:
        x, optimizer, local = made(2)
        parts, sent = {"optimizer": optimizer, "local": local}, local.ledger.total.sent
        save_checkpoint(tmp_path, parts, step=0)
        assert local.ledger.total.sent == sent

        def run() -> None:
            if worker == 0:
                save_checkpoint(tmp_path, parts, step=1) if call == "saves" else load_checkpoint(tmp_path, parts)
            train(2, x, optimizer, worker)

        return message(run)

    for found in simulate(body, 2):
        assert f"worker 0 {call} a checkpoint after step 0, and worker 1 checks its first step after step 1" in found
