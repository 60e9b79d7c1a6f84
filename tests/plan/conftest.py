"""Fixtures of the tests of plans."""

import pytest


@pytest.fixture(autouse=True)
def plans_take_first_timings(request: pytest.FixtureRequest) -> None:
    """Not where timings are tested."""
    if "reproduced" not in request.node.name:
        request.getfixturevalue("first_timings")
