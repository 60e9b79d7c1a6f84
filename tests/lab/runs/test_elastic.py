"""Launched workers that fail, are stopped, or are told to end."""

import os
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import launched
import pytest

from packsaddle.comm import launching
from packsaddle.comm.failures import TerminatedError, WorkerFailedError


def test_a_stopped_worker_is_killed_soon_after_another_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where torch's launcher would wait for 30 s; listened to are all waits for a process that lives."""
    waits = []
    join = BaseProcess.join

    def heard(self: BaseProcess, timeout: float | None = None) -> None:
        if self.is_alive() and timeout is not None:
            waits.append(timeout)
        join(self, timeout)

    monkeypatch.setattr(BaseProcess, "join", heard)
    monkeypatch.setattr(launching, "SHUTDOWN_SECONDS", 0.5)
    with pytest.raises(WorkerFailedError, match="worker 0 failed: ValueError: this batch is bad"):
        launching.launch(launched.fail_beside_a_stopped_one, (tmp_path,), 2)
    assert len(waits) >= 2
    assert max(waits) <= 0.5
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize("when", ["started", "starting"])
def test_workers_that_are_told_to_end_have_time_to_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """By SIGTERM on the command, though they would have none after a failure; and then they end by themselves. Also
    while the launcher is still in the start of a worker."""
    monkeypatch.setattr(launching, "SHUTDOWN_SECONDS", 0.0)
    sent, kill = [], os.kill

    def heard(pid: int, how: signal.Signals) -> None:
        sent.append(how)
        kill(pid, how)

    monkeypatch.setattr(os, "kill", heard)

    def tell() -> None:
        while len(list(tmp_path.glob("here-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    def start_and_tell(self: BaseProcess) -> None:
        start(self)
        started.append(self)
        if len(started) == 2:
            tell()

    start: Callable[[BaseProcess], None] = BaseProcess.start
    started: list[BaseProcess] = []
    if when == "starting":
        monkeypatch.setattr(BaseProcess, "start", start_and_tell)
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    if when == "started":
        threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(TerminatedError):
        launching.launch(launched.save_when_told, (tmp_path,), 2)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert sent == [signal.SIGTERM] * 3  # the launcher, and by it its workers
