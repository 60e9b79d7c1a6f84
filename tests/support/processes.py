"""Tests that start processes: found by what they call, and caught where they are not found."""

import inspect
import multiprocessing.process
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import _lru_cache_wrapper, cache
from os import PathLike
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

# What starts processes, as names in a test, in its fixtures, or in the functions of its module that these call.
STARTERS = {"subprocess", "Popen", "multiprocessing", "run_in_processes", "launch"}
# What makes network namespaces, or looks at which of them there are.
HOSTS = (
    *("test_hosts", "test_bytes_on_interface", "test_bench", "test_link_planner", "test_network_faults"),
    "test_race_to_loss",
)
WHOLE = ("test_hosts", "test_bytes_on_interface", "test_network_faults")  # all of whose tests start processes, or may

STARTED = ("python", "torchrun", "packsaddle", "ip", "unshare", "nsenter", "tc")  # git and the like are over at once

_folders = {str(Path(__file__).parents[1])}  # of tests and of what they import
_started: list[str] = []


def starts_processes(item: pytest.Item) -> bool:
    """Tell if the test is in a module that does little else, has the gloo fixture, or leads to a name of `STARTERS`."""
    if item.path.stem in WHOLE or "gloo" in getattr(item, "fixturenames", ()):
        return True
    _folders.add(str(item.path.parent))
    fixtures = item._fixtureinfo.name2fixturedefs if isinstance(item, pytest.Function) else {}
    functions = [getattr(item, "function", None), *(f.func for found in fixtures.values() for f in found)]
    return any(_leads_to_a_start(f) for f in functions if _is_of_tests(f))


def _is_of_tests(function: Any) -> bool:
    return isinstance(function, FunctionType) and function.__code__.co_filename.startswith(tuple(_folders))


@cache
def _leads_to_a_start(function: FunctionType) -> bool:
    """Follow the names in the function's code through the functions of tests that they stand for."""
    seen: set[FunctionType] = set()
    todo = [inspect.unwrap(function)]
    while todo:
        now = todo.pop()
        if now in seen:
            continue
        seen.add(now)
        names = set(_names(now.__code__))
        if names & STARTERS:
            return True
        called = (now.__globals__.get(name) for name in names)
        called = (getattr(f, "__wrapped__", f) if type(f) is _lru_cache_wrapper else f for f in called)
        todo += [f for f in called if _is_of_tests(f)]
    return False


def _names(code: CodeType) -> Iterator[str]:
    """Names that code, and the functions within it, takes from its module or from objects."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def watch() -> None:
    """Note each process that is started from here on by multiprocessing, or by a name of `STARTED`."""
    start: Callable[..., Any] = multiprocessing.process.BaseProcess.start
    popen: Callable[..., None] = subprocess.Popen.__init__

    def noted(self: Any) -> Any:
        _started.append(f"{self.name} of multiprocessing")
        return start(self)

    def opened(self: Any, args: Any, *more: Any, **options: Any) -> None:
        first = str(args if isinstance(args, str | PathLike) else args[0])
        if first == sys.executable or Path(first).name.startswith(STARTED):
            _started.append(str(args))
        popen(self, args, *more, **options)

    # Not sys.addaudithook: Python would call the hook for every id(), which takes a microsecond, and torch has many.
    multiprocessing.process.BaseProcess.start = noted  # type: ignore[method-assign]
    subprocess.Popen.__init__ = opened  # type: ignore[method-assign]


def started() -> list[str]:
    """Return what was started since the last call."""
    found = list(_started)
    _started.clear()
    return found
