"""Processes of a study's pool that die, and runs that fail in them: one line that names the run."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forked_python import environment, python

from lab.paper import runner
from lab.paper.runner import in_parallel
from packsaddle.comm.failures import WorkerFailedError
from packsaddle.errors import ConfigError, GuardError


def work(item: str) -> str:
    failures: dict[str, Callable[[], object]] = {
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "ended": lambda: os._exit(7),
        "terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    }
    errors = {"config": ConfigError("no"), "guard": GuardError("no"), "worker": WorkerFailedError("no", "trace")}
    if item in failures:
        time.sleep(1.0)  # while another one is under way
        failures[item]()
    if item in errors:
        raise errors[item]
    if item == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if item in ("long", "deaf"):
        time.sleep(60.0)
    return item


@pytest.mark.process
@pytest.mark.parametrize(
    ("failing", "kind", "message"),
    [
        (
            "killed",
            WorkerFailedError,
            "killed failed: its process was killed by SIGKILL; out of memory? choose fewer --jobs",
        ),
        ("ended", WorkerFailedError, "ended failed: its process ended with exit code 7"),
        ("terminated", WorkerFailedError, "long, terminated failed: its process ended"),
        ("config", ConfigError, "config: no"),
        ("guard", GuardError, "guard: no"),
        ("worker", WorkerFailedError, "worker: no"),
    ],
)
def test_a_run_that_fails_is_named(failing: str, kind: type[Exception], message: str) -> None:
    before = time.monotonic()
    with pytest.raises(kind) as caught:
        list(in_parallel(work, ["long", failing, "after", "after"], 2, lambda active: None))
    assert (type(caught.value), str(caught.value)) == (kind, message)
    assert time.monotonic() - before < 50  # what is under way is ended
    assert getattr(caught.value, "trace", "") == ("trace" if failing == "worker" else "")


@pytest.mark.process
def test_a_process_that_does_not_hear_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_GRACE", 0.5)
    before = time.monotonic()
    with pytest.raises(ConfigError, match="no"):
        list(in_parallel(work, ["deaf", "first", "second", "config"], 2, lambda active: None))
    assert time.monotonic() - before < 50


DYING = """
import sys
import packsaddle.cli as cli
from lab.paper import runner
sys.path[:0] = {folders!r}
from test_runner import work
cli.parse = lambda *arguments: lambda: list(runner.in_parallel(work, ["first", "killed"], 1, lambda active: None))
if __name__ == "__main__":
    cli.main()
"""


@pytest.mark.process
def test_the_command_says_one_line(tmp_path: Path) -> None:
    script = tmp_path / "dying.py"
    script.write_text(DYING.format(folders=[str(Path(__file__).parent), str(Path(__file__).parents[2] / "support")]))
    done = subprocess.run([python(), str(script)], capture_output=True, text=True, env=environment())
    expected = "packsaddle: killed failed: its process was killed by SIGKILL; out of memory? choose fewer --jobs\n"
    assert (done.returncode, done.stderr) == (1, expected)
