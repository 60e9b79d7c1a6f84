"""Real processes that are told to stop, or killed."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import launched
import pytest
from commandline import command
from forked_python import environment, fork_of, python
from runs import CONFIG, differences, lines, result

from packsaddle.comm import TerminatedError, launch

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


def test_workers_that_are_told_to_end_have_time_to_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By SIGTERM on the command; and then they end by themselves."""
    sent, kill = [], os.kill

    def heard(pid: int, how: signal.Signals) -> None:
        sent.append(how)
        kill(pid, how)

    monkeypatch.setattr(os, "kill", heard)

    def tell() -> None:
        while len(list(tmp_path.glob("here-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    threading.Thread(target=tell, daemon=True).start()
    with pytest.raises(TerminatedError):
        launch(launched.save_when_told, (tmp_path,), 2)
    assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers
    assert {path.name for path in tmp_path.glob("saved-*")} == {"saved-0", "saved-1"}
    assert sent == [signal.SIGTERM] * 3  # the launcher, and by it its workers
