"""The lock on a run's folder: whoever comes second is told so, and whatever ends the first lets go of it."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from commandline import command, refused
from forked_python import environment, fork_of, python, torchrun
from runs import CONFIG, lines

from lab.runs.folder_lock import LOCK, check_free, locked
from packsaddle.errors import ConfigError

WAYS: dict[str, tuple[str, ...]] = {"processes": ("--workers", "2"), "torchrun": ()}
LONG = ("--set", "epochs=1000", "--checkpoint-every", "10")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `python -m lab` with these arguments in a session of its own; all of it is ended afterwards."""
    started: list[subprocess.Popen[str]] = []

    def starting(*arguments: Any, by_torchrun: bool = False) -> subprocess.Popen[str]:
        words = ["-m", "lab", *map(str, arguments)]
        words = torchrun(*words) if by_torchrun else [python(), *words]
        nowhere, pipe = subprocess.DEVNULL, subprocess.PIPE
        started.append(subprocess.Popen(words, stdout=nowhere, stderr=pipe, text=True, env=environment()))
        return started[-1]

    yield starting
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(fork_of(process.pid), signal.SIGKILL)
        process.wait()
        if process.stderr:
            process.stderr.close()


def until(happened: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    for _ in range(1200):
        if happened():
            return
        assert process is None or process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.1)
    raise AssertionError("it has not happened in two minutes")


def trains(folder: Path) -> Callable[[], bool]:
    return lambda: (folder / "checkpoint").is_dir() and any((folder / "checkpoint").glob("*/worker-0.json"))


def is_free(folder: Path) -> bool:
    try:
        check_free(folder)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("way", WAYS)
def test_the_second_is_refused_and_told_who_was_first(
    way: str, config: Path, tmp_path: Path, start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a fresh run into the folder; when the first is killed, the folder is free and the run goes on."""
    folder = tmp_path / "run"
    first = start("run", config, "--out", folder, *WAYS[way], *LONG, by_torchrun=way == "torchrun")
    until(trains(folder), first)
    holder = json.loads((folder / LOCK).read_text())
    assert holder["host"] == socket.gethostname()
    assert way == "torchrun" or holder["pid"] == fork_of(first.pid)
    said = f"{folder} is being trained in by process {holder['pid']} on {holder['host']!r}"
    refused(capsys, said, "lab", "run", "--resume", folder)
    refused(capsys, said, "lab", "run", config, "--resume", folder, "--workers", 2, "--set", "epochs=1000")
    refused(capsys, said, "lab", "run", config, "--out", folder)
    if way == "torchrun":  # its workers have sessions of their own; with one gone, the other ends as well
        os.kill(holder["pid"], signal.SIGKILL)
    else:
        os.killpg(fork_of(first.pid), signal.SIGKILL)
    first.wait()
    until(lambda: is_free(folder))
    recorded = [line["step"] for line in lines(folder)]
    assert recorded == sorted(set(recorded))  # by one run alone


def test_workers_whose_launcher_was_killed_save_and_end(config: Path, tmp_path: Path, start: Any) -> None:
    """Until then nobody else may train in the folder: a resume would write every line a second time."""
    folder = tmp_path / "run"
    first = start("run", config, "--out", folder, "--workers", 2, *LONG)
    until(trains(folder), first)
    launcher = fork_of(first.pid)
    os.killpg(launcher, signal.SIGSTOP)
    os.kill(launcher, signal.SIGKILL)
    first.wait()
    with pytest.raises(ConfigError, match=f"by process {launcher} on .*, or workers that it has left"):
        check_free(folder)
    os.killpg(launcher, signal.SIGCONT)
    until(lambda: is_free(folder))
    stopped = json.loads((folder / "stopped.json").read_text())["step"]
    saved = folder / "checkpoint" / f"step-{stopped:08}"
    assert {path.name for path in saved.glob("*.json")} == {"worker-0.json", "worker-1.json"}


@pytest.mark.slow
def test_nothing_is_left_of_it(config: Path, tmp_path: Path) -> None:
    """By a run in a folder with a lock's file alone, which counts as new."""
    folder = tmp_path / "killed"
    folder.mkdir()
    (folder / LOCK).write_text('{"pid": 1, "host": "gone"}')
    assert command("lab", "run", config, "--resume", folder, "--set", "epochs=0.1") == 0
    assert not (folder / LOCK).exists()


def test_a_lock_taken_anew_while_its_file_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was locked may be a file that its last holder has removed since it was opened; it locks nothing."""
    real, opened = os.open, []

    def open_late(path: Any, flags: int, mode: int = 0o777) -> int:
        number = real(path, flags, mode)
        if Path(path).name == LOCK and not opened:
            opened.append(number)
            Path(path).unlink()
        return number

    monkeypatch.setattr(os, "open", open_late)
    with locked(tmp_path), pytest.raises(ConfigError, match="is being trained in by process"):
        check_free(tmp_path)
    assert opened
    assert list(tmp_path.iterdir()) == []


def test_a_study_is_made_by_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ("lab.paper", "text", "--scale", "smoke", "--seeds", 1, "--resume", "--out", tmp_path)
    (tmp_path / "study.json").write_text('{"study": "text", "scale": "smoke"}')
    with locked(tmp_path):
        refused(capsys, f"{tmp_path} is being trained in by process {os.getpid()}", *study)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
