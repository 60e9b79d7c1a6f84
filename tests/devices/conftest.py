"""The pretended device, and what the cases of `device_trainings` give on it: made once for all tests of this folder."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import device_trainings
import pytest
from device_trainings import Key, Outcome
from gloo import run_in_processes
from pretended_device import build

Outcomes = dict[Key, Outcome]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the tests of this folder on one of several pytest processes, for their common outcomes, and leave those of
    the pretended device, which takes 20 s to compile, to `make test-all`."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.xdist_group("devices"))
            if {"library", "in_child", "together", "alone"} & {*getattr(item, "fixturenames", ())}:
                item.add_marker(pytest.mark.nightly)


@pytest.fixture(scope="session")
def library() -> Path:
    if reason := build.unavailable():
        pytest.skip(f"a pretended device {reason}")
    return build.built()


@pytest.fixture(scope="session")
def in_child(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    """in_child(fn, *args, workers=1) runs fn(*args) in new processes, each of which can have one kind of device."""

    def run(fn: Callable[..., Any], *args: Any, workers: int = 1) -> list[Any]:
        return run_in_processes(fn, workers, tmp_path_factory.mktemp("device"), *args, fresh=True)

    return run


@pytest.fixture(scope="session")
def together(
    in_child: Callable[..., list[Any]], library: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], list[Outcomes]]:
    """together(kind) returns the outcomes of two workers on a kind of device, by rank."""

    def run(kind: str) -> list[Outcomes]:
        return in_child(device_trainings.together, kind, library, tmp_path_factory.mktemp("groups"), workers=2)

    return cache(run)


@pytest.fixture(scope="session")
def alone(in_child: Callable[..., list[Any]], library: Path) -> Callable[[str], Outcomes]:
    """alone(kind) returns the outcomes of one worker on a kind of device."""
    return cache(lambda kind: in_child(device_trainings.alone, kind, library)[0])
