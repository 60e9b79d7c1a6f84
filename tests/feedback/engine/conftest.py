"""The fixture that runs a function on all workers of a front."""

from collections.abc import Callable
from typing import Any

import pytest
from fronts import FRONTS

from packsaddle import simulate


@pytest.fixture
def on_workers(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    """on_workers(fn, front, *args) returns fn(front, *args) of two workers, in processes if the front needs it."""

    def run(fn: Callable[..., Any], front: str, *args: Any, workers: int = 2) -> list[Any]:
        if FRONTS[front].processes:
            found: list[Any] = request.getfixturevalue("gloo")(fn, workers, front, *args)
            return found
        return simulate(lambda rank: fn(front, *args), workers)

    return run
