"""The simulation runs workers one at a time, in order, and says what is wrong when they do not match."""

import os
import signal

import pytest
import torch

from packsaddle import simulate
from packsaddle.comm.group import Solo, resolve


def test_collectives() -> None:
    def worker(rank: int) -> tuple[list[float], list[list[float]], list[float]]:
        group = resolve(None)
        assert (group.rank, group.size) == (rank, 4)
        total, root = torch.tensor([1.0 * rank, 1.0]), torch.tensor([10.0 + rank])
        group.all_reduce(total)
        gathered = group.all_gather(torch.tensor([rank, -rank]))
        group.broadcast(root)
        return total.tolist(), [t.tolist() for t in gathered], root.tolist()

    assert simulate(worker, 4) == [([6.0, 4.0], [[0, 0], [1, -1], [2, -2], [3, -3]], [10.0])] * 4


def test_one_at_a_time_in_order() -> None:
    trace: list[tuple[int, int]] = []

    def worker(rank: int) -> None:
        for round_ in range(3):
            trace.append((round_, rank))
            resolve(None).all_reduce(torch.zeros(1))

    simulate(worker, 3)
    assert trace == [(round_, rank) for round_ in range(3) for rank in range(3)]


def test_results_do_not_alias() -> None:
    def worker(rank: int) -> torch.Tensor:
        tensor = torch.ones(2)
        resolve(None).all_reduce(tensor)
        gathered = resolve(None).all_gather(tensor)
        gathered[0].fill_(-1.0)
        tensor.add_(rank)
        return tensor + resolve(None).all_gather(torch.zeros(2))[0]

    assert [r.tolist() for r in simulate(worker, 2)] == [[2.0, 2.0], [3.0, 3.0]]


def test_outside_there_is_one_worker() -> None:
    assert isinstance(resolve(None), Solo)
    simulate(lambda rank: None, 2)
    assert isinstance(resolve(None), Solo)
    with pytest.raises(TypeError, match="process_group must be a torch ProcessGroup"):
        resolve("gloo")  # type: ignore[arg-type]


def test_a_failure_ends_all_and_is_raised() -> None:
    def worker(rank: int) -> None:
        resolve(None).all_reduce(torch.zeros(1))
        if rank == 1:
            raise KeyError("broken")
        resolve(None).all_reduce(torch.zeros(1))

    with pytest.raises(KeyError, match="broken"):
        simulate(worker, 3)


def test_an_interruption_ends_the_workers() -> None:
    """Ctrl-C in the main thread: no worker goes on in the background."""
    steps: list[int] = []

    def worker(rank: int) -> None:
        while len(steps) < 10**6:
            steps.append(rank)
            if len(steps) == 100:
                os.kill(os.getpid(), signal.SIGINT)
            resolve(None).all_reduce(torch.zeros(1))

    # A shell that runs tests in the background has SIGINT ignored, and Python then leaves it so.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            simulate(worker, 2)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert 100 <= len(steps) < 10**6


def test_mismatched_collectives() -> None:
    def uneven(rank: int) -> None:
        resolve(None).all_reduce(torch.zeros(1 + rank))

    def early(rank: int, quitter: int) -> None:
        if rank != quitter:
            resolve(None).all_reduce(torch.zeros(1))

    with pytest.raises(RuntimeError, match=r"worker 0 calls \('all_reduce', \(\(1,\).*worker 1 calls .*\(2,\)"):
        simulate(uneven, 2)
    for quitter in (0, 1):
        with pytest.raises(RuntimeError, match="finished"):
            simulate(lambda rank, q=quitter: early(rank, q), 2)
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        simulate(lambda rank: None, 0)
