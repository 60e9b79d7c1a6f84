"""The pool of processes: results, a process that dies, and items that fail: the error names the item."""

import os
import time

import pytest

from lab.pool import Report, in_parallel
from packsaddle.comm.failures import WorkerFailedError
from packsaddle.errors import ConfigError, GuardError

ERRORS = {"config": ConfigError("no"), "guard": GuardError("no"), "worker": WorkerFailedError("no", "trace")}


def work(item: str, report: Report) -> str:
    report(0.5)
    if item == "ended":
        time.sleep(0.3)  # while another one is under way
        os._exit(7)
    if item in ERRORS:
        raise ERRORS[item]
    if item == "long":
        time.sleep(600.0)  # is ended when the other item fails
    return item.upper()


@pytest.mark.process
@pytest.mark.parametrize(
    ("failing", "kind", "message"),
    [
        ("ended", WorkerFailedError, "ended failed: its process ended with exit code 7"),
        ("config", ConfigError, "config: no"),
        ("guard", GuardError, "guard: no"),
        ("worker", WorkerFailedError, "worker: no"),
    ],
)
def test_an_item_that_fails_is_named(failing: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        list(in_parallel(work, ["long", failing, "after", "after"], "label", 2))
    assert (type(caught.value), str(caught.value)) == (kind, message)
    assert getattr(caught.value, "trace", "") == ("trace" if failing == "worker" else "")


@pytest.mark.process
def test_every_item_has_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    items = [f"item {i}" for i in range(5)]
    assert sorted(in_parallel(work, items, "[red]label", 2)) == [(item, item.upper()) for item in items]
    printed = capsys.readouterr().out.splitlines()
    assert all(line.startswith("[red]label: ") for line in printed)
    assert not list(in_parallel(work, [], "nothing", 2))
