"""The options of a search: each is checked where it is declared."""

import math
from typing import Any

import pytest

from packsaddle import Search

WRONG = [
    ({"max_hvps": 0}, "max_hvps must be at least 1, got 0"),
    ({"failure_probability": 1.0}, "failure_probability must be in [1e-100, 1), got 1.0"),
    ({"tolerance": math.nan}, "tolerance must be positive, got nan"),
    ({"hvp": "exact"}, "hvp must be one of auto, double-backward, differences, got 'exact'"),
    ({"memory_limit": -1}, "memory_limit must not be negative, got -1"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[name for given, _ in WRONG for name in given])
def test_a_value_outside_its_range_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 -- the whole message is compared
        Search(**given)
    assert str(caught.value) == message


def test_limits_of_the_ranges_are_allowed() -> None:
    assert Search(max_hvps=1, failure_probability=1e-100, memory_limit=0).tolerance == math.inf
