"""Fixtures: real gloo worker processes, and toy runs shared by several test modules."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from workers import run_in_processes

# The same examples everywhere, and no verdict by the clock.
settings.register_profile("packsaddle", deadline=None, derandomize=True)
settings.load_profile("packsaddle")

# Tests run beside worker processes on few cores, and small tensors gain nothing from threads.
torch.set_num_threads(1)


# What makes network namespaces looks at which of them there are.
HOSTS = ("test_hosts", "test_interface", "test_bench", "test_linkplan", "test_network_faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run on several processes, keep those that make hosts on one."""
    for item in items:
        if item.path.stem in HOSTS:
            item.add_marker(pytest.mark.xdist_group("hosts"))


@pytest.fixture
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """gloo(fn, workers, *args) runs fn(*args) in that many gloo processes and returns the results by rank."""

    def run(fn: Callable[..., Any], workers: int, *args: Any, fresh: bool = False) -> list[Any]:
        return run_in_processes(fn, workers, tmp_path_factory.mktemp("gloo"), *args, fresh=fresh)

    return run
