"""Workers whose parameters are no longer equal are found out and named on all of them, on every front."""

from collections.abc import Callable
from typing import Any

from fronts import made, parameters_of

from packsaddle import Identity, RandomK, TopK
from packsaddle.comm.group import resolve

WAYS: dict[str, dict[str, Any]] = {
    "TopK": {},
    "RandomK": {"compressor": RandomK(0.2)},
    "uncompressed": {"compressor": Identity()},
    "two-way": {"exchange": "two-way"},
    "escape": {"escape": (100, 1e9)},
    "momentum": {"momentum": 0.9},
    "bfloat16 messages": {"compressor": TopK(0.05, values="bfloat16")},
}
CASES: dict[str, Any] = {"CompressedSGD": WAYS, "local": ["TopK"], "DDP by buckets": ["TopK"], "FSDP": ["TopK"]}


def drifted(front: str, way: str, disturbed: bool) -> dict[str, Any]:
    """Worker 1 finds a number of x changed after step 7; compared every third exchange."""
    one = made(front, compare_every=3, **WAYS[way])
    message, name = "", ""
    try:
        for t in range(24):
            one.step(t)
            if t == 7 and disturbed and resolve(None).rank == 1:
                name = one.disturb()
    except RuntimeError as error:
        message = str(error)
        one.end()
    return {"message": message, "name": name, "steps": one.engine.steps}


@parameters_of(CASES)
def test_a_changed_number_is_named(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    first, second = on_workers(drifted, front, way, True)
    for found in (first, second):
        assert f"worker 1 differs from worker 0 in {second['name']}" in found["message"]
        assert found["steps"] == first["steps"] <= (18 if front == "local" else 9)


@parameters_of(CASES)
def test_workers_that_are_equal_are_left_alone(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    for found in on_workers(drifted, front, way, False):
        assert (found["message"], found["steps"]) == ("", 24)
