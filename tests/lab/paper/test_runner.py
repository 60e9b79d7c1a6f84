"""A process of a study's pool that dies, and runs that fail in one: the error names the run."""

import os
import time

import pytest

from lab.paper.runner import in_parallel
from packsaddle.comm.failures import WorkerFailedError
from packsaddle.errors import ConfigError

ERRORS = {"config": ConfigError("no"), "worker": WorkerFailedError("no", "trace")}


def work(item: str) -> str:
    if item == "ended":
        time.sleep(0.3)  # while another one is under way
        os._exit(7)
    if item in ERRORS:
        raise ERRORS[item]
    if item == "long":
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
