"""Fixtures: real gloo worker processes, and toy runs shared by several test modules."""

import faulthandler
import math
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator
from itertools import count
from typing import Any

import forked_python
import processes
import pytest
import torch
from gloo import run_in_processes
from hypothesis import settings

# The same examples everywhere, and no verdict by the clock.
settings.register_profile("packsaddle", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("packsaddle")

# Every pytest process, worker process and command would compile all source files anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Tests run beside worker processes on few cores, and small tensors gain nothing from threads.
torch.set_num_threads(1)


processes.watch()


_RENEWED = 30.0  # seconds after which a test that begins renews the watch
_patience = 450.0  # seconds
_since = -math.inf  # when the watch was last renewed
_stderr: list[int] = []  # that of the process, which pytest takes away during tests


def pytest_configure() -> None:
    _stderr[:] = [os.dup(2)]
    if sys.platform == "linux":
        forked_python.spawn_from_the_server()


def _watch() -> None:
    """Have this process print the stacks of all its threads, and end, unless another test begins in time."""
    global _since
    _since = time.monotonic()
    faulthandler.dump_traceback_later(_patience + _RENEWED, exit=True, file=_stderr[0])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Guard against what pytest-timeout cannot end: waits in C, for what it has ended, and between tests."""
    global _patience
    marker = item.get_closest_marker("timeout")
    patience = 1.5 * float(marker.args[0] if marker else item.config.getini("timeout"))
    # Not for every test: a thread ends and another one starts, and on busy cores the test would wait for both.
    if patience != _patience or time.monotonic() - _since > _RENEWED:
        _patience = patience
        _watch()
    return (yield)


@pytest.hookimpl(trylast=True)
def pytest_exception_interact() -> None:
    """Go on watching, which pytest ends."""
    _watch()


def pytest_sessionfinish() -> None:
    faulthandler.cancel_dump_traceback_later()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more pytest process than cores: many tests wait for links, timeouts and processes that start and end."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(specs: list[Any]) -> None:
    """On Linux, make pytest's processes forks of one Python that has torch, as the programs are that tests start."""
    if sys.platform == "linux":
        for spec in specs:
            spec.python = forked_python.python()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that start processes, and keep those that make hosts on one of several pytest processes."""
    for item in items:
        if processes.starts_processes(item):
            item.add_marker(pytest.mark.process)
        if item.path.stem in processes.HOSTS:
            item.add_marker(pytest.mark.xdist_group("hosts"))
    # The long ones first, so that pytest's processes end at about the same time.
    items.sort(key=lambda item: not any(map(item.get_closest_marker, ("process", "slow"))))


@pytest.fixture(autouse=True)
def marked_if_it_starts_processes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that starts a process and is not marked `process`: `make quick` must be able to leave it out."""
    processes.started()
    yield
    if (found := processes.started()) and request.node.get_closest_marker("process") is None:
        pytest.fail(f"the test starts {found[0]}, and is not marked: add @pytest.mark.process")


@pytest.fixture(autouse=True)
def the_same_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates without a generator start alike in every run of a test: each may be wrong with some probability."""
    seeds = count()
    fresh = "packsaddle.curvature.hessian.fresh_generator"
    monkeypatch.setattr(fresh, lambda: torch.Generator().manual_seed(next(seeds)))


@pytest.fixture
def first_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first timings: other tests load the machine, where plans repeat theirs for 20 s."""
    monkeypatch.setattr("packsaddle.plan.timing._is_reproduced", lambda fastest, within: True)


@pytest.fixture(scope="session")
def hosts_here() -> None:
    """Skip a test of hosts with links between them where this machine cannot make them."""
    from lab.bench.hosts import available

    if reason := available():
        pytest.skip(f"a slow link {reason}")


@pytest.fixture
def forks_on_hosts(hosts_here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On hosts, start forks of the python that has torch; skip where there are no hosts."""
    monkeypatch.setattr(sys, "executable", forked_python.python())
    monkeypatch.setenv("PYTHON_EXEC", forked_python.python())


@pytest.fixture
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """gloo(fn, workers, *args) runs fn(*args) in that many gloo processes and returns the results by rank."""

    def run(fn: Callable[..., Any], workers: int, *args: Any, fresh: bool = False) -> list[Any]:
        return run_in_processes(fn, workers, tmp_path_factory.mktemp("gloo"), *args, fresh=fresh)

    return run
