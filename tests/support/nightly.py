"""Tests that `make test` leaves to `make test-all`, since their subject has others there that take less time."""

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], step: int) -> list[Any]:
    """Return the values of a parametrized test. Of each `step` of them the first has no mark, and the others have the
    mark `nightly`."""
    given = [v if isinstance(v, tuple) else (v,) for v in values]
    return [nightly(*v) if i % step else pytest.param(*v) for i, v in enumerate(given)]


def nightly(*values: Any) -> Any:
    """Return one set of values of a parametrized test, marked `nightly`."""
    return pytest.param(*values, marks=pytest.mark.nightly)
