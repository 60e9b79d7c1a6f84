"""Tests that `make test` leaves to `make test-all`, since their subject has others there that take less time."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], step: int) -> list[Any]:
    """Return the values of a parametrized test, all of which but every `step`-th are marked `nightly`."""
    given = [v if isinstance(v, tuple) else (v,) for v in values]
    return [pytest.param(*v, marks=[pytest.mark.nightly] * (i % step > 0)) for i, v in enumerate(given)]


def nightly(*values: Any) -> Any:
    """Return one set of values of a parametrized test, marked `nightly`."""
    return pytest.param(*values, marks=pytest.mark.nightly)
