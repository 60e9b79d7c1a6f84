"""Detection of tests that start processes, by the names that they use."""

import inspect
from collections.abc import Iterator
from functools import _lru_cache_wrapper, cache
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

# Names of functions and modules that start processes. They are searched for in a test, in its fixtures, and in the
# functions of the tests that these call.
STARTERS = {"subprocess", "Popen", "multiprocessing", "run_in_processes", "launch"}
# Names of functions that create or list network namespaces.
HOSTS = (
    *("test_hosts", "test_bytes_on_interface", "test_bench", "test_link_planner", "test_network_faults"),
    "test_race_to_loss",
)
WHOLE = ("test_hosts", "test_bytes_on_interface", "test_network_faults")  # modules whose tests may all start processes

_folders = {str(Path(__file__).parents[1])}  # folders of tests and of the modules that they import


def starts_processes(item: pytest.Item) -> bool:
    """Return True if a test starts processes.

    This is assumed if it is in a module of `WHOLE`, uses the fixture gloo, or calls code with a name in `STARTERS`.
    """
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
    """Return True if a function's code, or that of a test function which it calls, has a name in `STARTERS`."""
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
    """Yield the names of globals and attributes that a code object and the functions inside it use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
