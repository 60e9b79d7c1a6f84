"""The escape check measures distance from weights that are loaded before the first step, on fronts that have one."""

from collections.abc import Callable
from typing import Any

from fronts import made, parameters_of


def resets(front: str) -> int:
    """Return the resets of two small steps after all parameters have moved by three radii, to a flat point."""
    one = made(front, escape=(10**6, 5.0))
    for p in one.parameters():
        p.zero_()
    for t in range(2):
        one.step(t)
    return len(one.engine.resets)


@parameters_of({front: ["loaded"] for front in ("CompressedSGD", "local")})
def test_the_check_begins_at_loaded_weights(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    assert on_workers(resets, front) == [0, 0]
