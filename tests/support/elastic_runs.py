"""Runs of simulated elastic workers with faults, joins and leaves. Their results are read from public attributes."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from elastic_fakes import FakeManager, Worker

from packsaddle import OuterSGD, simulate
from packsaddle.comm import Solo, resolve

ROUNDS = 6
# Number of the collective, counted from 0, that confirms the second round. A join has two collectives, a round four.
CONFIRM = 9


def adamw(tensors: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tensors, 0.05)


# Arguments of `run`. `together` is the step at which worker 1 joins worker 0. `leaves` has the steps at which worker 1
# leaves and worker 0 continues alone. `bad` is the step at which x of worker 0 is not finite. `broken` has the numbers
# of the collectives that fail, by worker.
SETTINGS: dict[str, dict[str, Any]] = {
    "all there": {"workers": 3, "noise": 0.01},
    "join": {"together": 7},
    "join, Nesterov outside": {"together": 7, "outer": OuterSGD(), "inner": adamw},
    "leave": {"leaves": (10, 12)},
    "leave, fragments": {"leaves": (3, 4), "fragments": 2, "every": 2, "outer": OuterSGD()},
    "confirmation lost, not committed": {"broken": {0: {CONFIRM}, 1: {CONFIRM}}},
    "confirmation lost, committed by the other": {"broken": {1: {CONFIRM}}},
    "confirmation lost, committed, Nesterov outside": {"broken": {1: {CONFIRM}}, "outer": OuterSGD(), "inner": adamw},
    "confirmation lost, committed by one of three": {"broken": {1: {CONFIRM}, 2: {CONFIRM}}, "workers": 3},
    "exchange lost": {"broken": {0: {CONFIRM - 1}, 1: {CONFIRM - 1}}},
    "votes lost": {"refused": {2, 3}, "keep_unsent": False},
    "flush": {"flush": True, "keep_unsent": False},
    "NaN": {"bad": 7, "noise": 0.01},
}


def run(
    workers: int = 2,
    together: int = 0,
    leaves: tuple[int, int] | None = None,
    broken: Mapping[int, set[int]] | None = None,
    bad: int = -1,
    *,
    flush: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Do a run, and return each worker's final results: x, anchor, pending updates, ledger and counts."""
    managers: list[FakeManager] = []

    def begin(rank: int) -> Worker:
        worker = Worker(resolve(None), broken=(broken or {}).get(rank, ()), **options)
        if together and rank == 0:
            worker.manager.group = Solo()
        managers.append(worker.manager)
        worker.manager.before_quorum = lambda: catch_up(worker.manager, managers)
        return worker

    def work(rank: int) -> dict[str, Any]:
        worker, group = begin(rank), resolve(None)
        worker.local.join()
        steps = 0
        while worker.local.rounds < ROUNDS:
            # Set the group of workers that are present from this step on.
            if steps == together and together:
                worker.manager.group = group
            if leaves and rank == 1 and steps == leaves[0]:
                worker.local.leave()
                break
            if leaves and rank == 0 and steps == leaves[1]:
                worker.manager.group = Solo()
            # Do an inner step, and the round if it is due.
            if steps == bad and rank == 0:
                worker.parameters[0].data[0, 0] = torch.nan
            worker.train(1)
            steps += 1
        if flush:
            worker.local.flush()
        return results(worker)

    return simulate(work, workers)


def catch_up(manager: FakeManager, managers: list[FakeManager]) -> None:
    """Load the state of the worker with the most steps, as torchft does at a quorum, if this worker has fewer."""
    ahead = max(managers, key=lambda other: other.step)
    if manager.group.size > 1 and ahead.step > manager.step:
        manager.load(deepcopy(ahead.save()))  # a copy, like a state that is received from another machine
        manager.step = ahead.step


def results(worker: Worker) -> dict[str, Any]:
    local = worker.local
    counts = [local.steps, local.rounds, local.position, local.skipped, local.workers]
    skips = [(skip.index, skip.workers) for skip in local.skips]
    return {
        "x": [worker.x(), worker.anchor()],
        "e": local.pending(),
        "ledger": local.ledger,
        "counts": [counts, skips],
    }
