"""The lock on a run's folder: a second run is refused, and whatever ends the first lets go of it."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from commandline import refused
from forked_python import environment, fork_of, python, torchrun
from runs import CONFIG, lines

from lab.runs.folder_lock import check_free, locked
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
def test_the_second_is_refused(
    way: str, config: Path, tmp_path: Path, start: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also a fresh run into the folder; when the first is killed, the folder is free and the run goes on."""
    folder = tmp_path / "run"
    first = start("run", config, "--out", folder, *WAYS[way], *LONG, by_torchrun=way == "torchrun")
    until(trains(folder), first)
    said = f"{folder} is being trained in by another process"
    refused(capsys, said, "lab", "run", "--resume", folder)
    refused(capsys, said, "lab", "run", config, "--resume", folder, "--workers", 2, "--set", "epochs=1000")
    refused(capsys, said, "lab", "run", config, "--out", folder)
    if way == "torchrun":  # its workers have sessions of their own, and end on SIGTERM to the launcher
        os.kill(fork_of(first.pid), signal.SIGTERM)
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
    with pytest.raises(ConfigError, match="by another process, or by workers that it has left"):
        check_free(folder)
    os.killpg(launcher, signal.SIGCONT)
    until(lambda: is_free(folder))
    stopped = json.loads((folder / "stopped.json").read_text())["step"]
    saved = folder / "checkpoint" / f"step-{stopped:08}"
    assert {path.name for path in saved.glob("*.json")} == {"worker-0.json", "worker-1.json"}


def test_a_study_is_made_by_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = ("lab.paper", "text", "--scale", "smoke", "--seeds", 1, "--resume", "--out", tmp_path)
    (tmp_path / "study.json").write_text('{"study": "text", "scale": "smoke"}')
    with locked(tmp_path):
        refused(capsys, f"{tmp_path} is being trained in by another process", *study)
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]
