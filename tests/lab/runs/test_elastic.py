"""Real processes that are told to stop, or killed."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import launched
import pytest
from commandline import command
from forked_python import environment, fork_of, python
from runs import CONFIG, differences, lines, result

from packsaddle.comm import launching
from packsaddle.comm.failures import TerminatedError, WorkerFailedError

PATIENCE = 120.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG.replace("epochs = 1", "epochs = 8").replace("log_every = 10", "log_every = 5"))
    return path


@contextmanager
def started(*words: Any) -> Iterator["subprocess.Popen[str]"]:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*map(str, words)], stdout=pipe, stderr=pipe, text=True, env=environment(), start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    begin = time.monotonic()
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.01)


@pytest.mark.process
def test_sigterm_stops_a_launched_run_that_goes_on_to_the_same_end(config: Path, tmp_path: Path) -> None:
    """The end is that of an uninterrupted simulation of the same two workers."""
    straight, launched = tmp_path / "straight", tmp_path / "launched"
    serial = ("--workers", 2, "--serial")
    assert command("lab", "run", config, *serial, "--out", straight) == 0
    with started(python(), "-W", "error", "-m", "lab", "run", config, "--workers", 2, "--out", launched) as process:
        until(lambda: lines(launched), process)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert f"to resume: python -m lab run --resume {launched} --workers 2" in out
    assert not (launched / "summary.json").exists()
    assert command("lab", "run", "--resume", launched, *serial) == 0
    assert differences(result(straight), result(launched)) == []


@pytest.mark.nightly
@pytest.mark.process
def test_a_killed_run_goes_on_to_the_same_end(config: Path, tmp_path: Path) -> None:
    """All processes get SIGKILL while they save checkpoints, of which the last one may be half written."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    saving = ("--workers", 2, "--checkpoint-every", 1)
    assert command("lab", "run", config, *saving, "--serial", "--out", straight) == 0
    with started(python(), "-m", "lab", "run", config, *saving, "--out", killed) as process:
        until(lambda: len(lines(killed)) >= 2, process)
        os.killpg(fork_of(process.pid), signal.SIGKILL)
        process.communicate(timeout=PATIENCE)
    assert not (killed / "summary.json").exists()
    assert command("lab", "run", "--resume", killed, *saving, "--serial") == 0
    assert differences(result(straight), result(killed)) == []


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
