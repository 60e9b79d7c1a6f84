"""Processes of a study's pool that die, and runs that fail in them: one line that names the run."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from lab.paper import runner
from lab.paper.runner import in_parallel
from packsaddle.comm.failures import WorkerFailedError
from packsaddle.errors import ConfigError

FAILURES: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "ended": lambda: os._exit(7),
}
ERRORS = {"config": ConfigError("no"), "worker": WorkerFailedError("no", "trace")}


def work(item: str) -> str:
    if item in FAILURES:
        time.sleep(0.3)  # while another one is under way
        FAILURES[item]()
    if item in ERRORS:
        raise ERRORS[item]
    if item == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if item in ("long", "deaf"):
        time.sleep(60.0)
    return item


@pytest.mark.process
@pytest.mark.parametrize(
    ("failing", "kind", "message"),
    [
        ("ended", WorkerFailedError, "ended failed: its process ended with exit code 7"),
        ("config", ConfigError, "config: no"),
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
