"""Workers whose parameters are no longer equal are found out and named on all of them, on every front."""

from collections.abc import Callable
from typing import Any

import torch
from fronts import made, parameters_of

from packsaddle.comm.group import resolve

STOPS = {"CompressedSGD": ["stop"], "DDP by buckets": ["stop"], "FSDP": ["stop"], "local": ["stop"]}
REPAIRS = {"CompressedSGD": ["repair"], "local": ["repair"]}


def drifted(front: str, on_drift: str, disturbed: bool) -> dict[str, Any]:
    """Worker 1 finds a number of x changed after step 7; compared every third exchange."""
    one = made(front, compare_every=3, on_drift=on_drift)
    message, name = "", ""
    try:
        for t in range(24):
            one.step(t)
            if t == 7 and disturbed and resolve(None).rank == 1:
                name = one.disturb()
    except RuntimeError as error:
        message = str(error)
        one.end()
    return {
        "message": message,
        "name": name,
        "steps": one.engine.steps,
        "drifts": [(d.workers, d.name) for d in one.engine.drifts] if on_drift == "repair" else [],
        "x": one.x(),
    }


@parameters_of(STOPS)
def test_a_changed_number_is_named(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    first, second = on_workers(drifted, front, way, True)
    for found in (first, second):
        assert f"worker 1 differs from worker 0 in {second['name']}" in found["message"]
        assert found["steps"] == first["steps"] < 24


@parameters_of(REPAIRS)
def test_a_repair_copies_worker_0(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    first, second = on_workers(drifted, front, way, True)
    assert first["drifts"] == second["drifts"] == [((1,), second["name"])]
    assert (first["message"], second["message"]) == ("", "")
    assert torch.equal(first["x"], second["x"])


@parameters_of(STOPS)
def test_workers_that_are_equal_are_left_alone(front: str, way: str, on_workers: Callable[..., list[Any]]) -> None:
    for found in on_workers(drifted, front, way, False):
        assert (found["message"], found["steps"]) == ("", 24)
