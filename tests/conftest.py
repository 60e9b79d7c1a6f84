"""Fixtures: real gloo worker processes, and toy runs shared by several test modules."""

import os
import sys
from collections.abc import Callable
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


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more pytest process than cores: many tests wait for links, timeouts and processes that start and end."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes() -> None:
    """Start the Python whose forks are the programs that tests start: once for all of pytest's processes."""
    forked_python.python()


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
def the_same_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Certificates without a generator start alike in every run of a test: each may be wrong with some probability."""
    seeds = count()
    fresh = "packsaddle.curvature.mean_loss.fresh_generator"
    monkeypatch.setattr(fresh, lambda: torch.Generator().manual_seed(next(seeds)))


@pytest.fixture
def first_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first timings: other tests load the machine, where plans repeat theirs for 20 s."""
    monkeypatch.setattr("packsaddle.plan.timing._is_reproduced", lambda fastest, within: True)


@pytest.fixture(scope="session")
def hosts_here() -> None:
    """Skip a test of hosts with links between them where this machine cannot make them."""
    from lab.race.hosts import available

    if reason := available():
        pytest.skip(f"a slow link {reason}")


@pytest.fixture
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """gloo(fn, workers, *args) runs fn(*args) in that many gloo processes and returns the results by rank."""

    def run(fn: Callable[..., Any], workers: int, *args: Any, fresh: bool = False) -> list[Any]:
        return run_in_processes(fn, workers, tmp_path_factory.mktemp("gloo"), *args, fresh=fresh)

    return run
