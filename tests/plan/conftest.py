"""Fixtures of the tests of plans."""

import pytest


@pytest.fixture(autouse=True)
def first_timings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the first timings: other tests load the machine, where plans repeat theirs for 20 s. Not where that is
    tested."""
    if "reproduced" not in request.node.name:
        monkeypatch.setattr("packsaddle.plan.timing._is_reproduced", lambda seconds, within: True)
