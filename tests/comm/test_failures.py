"""When a worker dies or hangs, the others end, and name it."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from forked_python import environment, python

from packsaddle.comm.failures import PeerLostError, Roll, explanation, is_network, roll_call
from packsaddle.comm.group import TorchGroup


class Board:
    """A store that is a dictionary; if it hangs, for longer than the test."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.keys: set[str] = set()
        self.hangs = hangs
        self.end = threading.Event()

    def set(self, key: str, value: str) -> None:
        if self.hangs:
            self.end.wait(60)
        self.keys.add(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self.keys for key in keys)


def test_roll_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of four call; each learns that it is the other one that is gone. Time passes, a second from one reading of
    the clock to the next, once all three are there."""
    store, found, readings = Board(), {}, count()

    def monotonic() -> float:
        return float(next(readings)) if store.check([f"packsaddle/here/{rank}" for rank in (0, 1, 3)]) else 0.0

    clock = SimpleNamespace(monotonic=monotonic, sleep=lambda seconds: time.sleep(1e-3))
    monkeypatch.setattr("packsaddle.comm.failures.time", clock)

    def call(rank: int) -> None:
        found[rank] = roll_call(store, rank, [0, 1, 2, 3], grace=30.0)

    threads = [threading.Thread(target=call, args=(rank,)) for rank in (0, 1, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys((0, 1, 3), Roll((0, 1, 3), (2,), True))


@pytest.mark.slow
def test_a_store_that_does_not_answer() -> None:
    store = Board(hangs=True)
    assert roll_call(store, 1, [0, 1], grace=0.1) == Roll((1,), (0,), False)
    store.end.set()


def test_words() -> None:
    error = RuntimeError("[/gloo/transport/tcp/pair.cc:553] Connection closed by peer [1.2.3.4]:5. Typically ...")
    assert is_network(error)
    assert not is_network(RuntimeError("the size of tensor a must match"))
    timeout = timedelta(seconds=90)
    said = explanation(Roll((0, 3), (1, 2), True), 0, 4, error, timeout)
    assert "rank 0 of 4 lost ranks 1, 2 (dead, hung or cut off; the other 2 answer). Read its output and resume" in said
    assert "raise the timeout of 90 s" in said
    assert "Reason: Connection closed by peer [1.2.3.4]:5" in said
    assert "all 2 answer now: one was late, or" in explanation(Roll((0, 1), (), True), 0, 2, error, timeout)
    assert "network of rank 1 or rank 0 is cut" in explanation(Roll((1,), (0,), False), 1, 2, error, timeout)


NCCL = [
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, remote process exited or there was a "
    "network error, NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error or a remote "
    "process exiting prematurely.",
    "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=4, OpType=BROADCAST) ran for 1800011 "
    "milliseconds before timing out.",
    "NCCL communicator was aborted on rank 1. Original reason for failure was: ...",
]


def failures_of_nccl() -> list[str]:
    """What a group that claims to have NCCL alone says of NCCL's errors."""
    found = []
    nccl_alone = mock.patch.object(torch.distributed, "get_backend_config", return_value="cuda:nccl")
    for text in NCCL:
        with nccl_alone, pytest.raises(PeerLostError) as raised, TorchGroup().naming_lost_workers():
            raise RuntimeError(text)
        found.append(str(raised.value))
    return found


def test_errors_of_nccl(gloo: Callable[..., list[Any]]) -> None:
    reasons = [
        "remote process exited or there was a network error",
        "Watchdog caught collective",
        "NCCL communicator was",
    ]
    for found in gloo(failures_of_nccl, 2):
        for said, reason in zip(found, reasons, strict=True):
            assert "lost the others, but all 2 answer now" in said
            assert f"Reason: {reason}" in said
    assert not is_network(RuntimeError("NCCL error in: a.cpp:1, invalid usage, NCCL version 2.21.5"))


@pytest.mark.parametrize("how", ["kill", "stop", "held"])
def test_survivors_name_the_lost_worker(how: str, tmp_path: Path) -> None:
    """Of three real workers the last is killed, or stopped; or the first, which holds the store, is killed."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    store = f"tcp://127.0.0.1:{port}" if how == "held" else str(tmp_path / "store")
    script = Path(__file__).parents[1] / "support" / "lost_worker.py"
    workers = [
        subprocess.Popen(
            [python(), str(script), str(rank), "3", how, store],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment(),
        )
        for rank in range(3)
    ]
    survivors = workers[1:] if how == "held" else workers[:2]
    try:
        said = [worker.communicate(timeout=100)[0] for worker in survivors]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
            assert worker.stdout is not None
            worker.stdout.close()
    assert [worker.returncode for worker in survivors] == [3, 3]
    for text in said:
        expected = "rank 0 is dead" if how == "held" else "lost rank 2 (dead, hung or cut off; the other 2 answer)"
        assert expected in text, text
