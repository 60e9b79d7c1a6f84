"""Weights of workers, and paces of unequal workers.

Whole runs are compared with the twin in tests/feedback/engine/test_random_local_updates.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clock import WorkersClock
from torch import Tensor, nn

from packsaddle import (
    CheckpointError,
    Compression,
    LocalUpdates,
    Overlap,
    RandomK,
    Workers,
    load_checkpoint,
    save_checkpoint,
    simulate,
)
from packsaddle.comm.group import resolve
from packsaddle.integrations import measures


def test_a_flush_of_workers_with_weights() -> None:
    """It has four bits a value, after rounds that send less, so that something stays unsent."""

    def run(rank: int) -> Tensor:
        x = nn.Parameter(torch.zeros(50, 50))
        optimizer = torch.optim.SGD([x], lr=0.1)
        spec = Compression(RandomK(0.1), exchange="auto")
        local = LocalUpdates(optimizer, spec, every=4, workers=Workers(weight=2.0))
        x.grad = torch.randn(50, 50, generator=torch.Generator().manual_seed(rank))
        optimizer.step()
        assert local.flush()
        assert bool(local.pending().any())
        return x.detach()

    first, *others = simulate(run, 4)
    for x in others:
        assert torch.equal(x, first)


def paced(rank: int, seconds: Callable[[int], tuple[int, ...]], clock: WorkersClock, **options: Any) -> list[list[int]]:
    """Train for 14 rounds on a worker whose steps in round r take `seconds`(r); return the paces in each round."""
    x, found = nn.Parameter(torch.zeros(40, 50)), list[list[int]]()
    optimizer = torch.optim.SGD([x], lr=0.1)
    local = LocalUpdates(optimizer, every=8, workers=Workers(weight="steps"), **options)
    rng = torch.Generator().manual_seed(rank)
    while local.position < 14 * 16:
        if local.position // 16 == len(found):
            found.append(local.paces)
        clock.work(seconds(len(found) - 1)[rank])
        x.grad = torch.randn(40, 50, generator=rng)
        optimizer.step()
    assert measures(local)["pace"] == local.paces[rank]
    return found


@pytest.mark.parametrize("delay", [0, 3])
def test_paces_follow_the_speeds(delay: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """One worker is three times slower, and as fast as the other one from round 7 on; both log nothing else."""
    monkeypatch.setattr("packsaddle.local.schedule.time", clock := WorkersClock())
    with caplog.at_level("INFO", logger="packsaddle"):
        found = simulate(lambda rank: paced(rank, lambda r: (1, 3 if r < 7 else 1), clock, overlap=delay), 2)
    late = delay > 0  # an exchange that ends in the next round has its times
    expected = [[8, 8]] * (2 + late) + [[12, 4]] * 7 + [[8, 8]] * (5 - late)
    assert found == [expected, expected]
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition("workers")[2] for text in said] == [
        f" make {h} inner steps in a round" for h in ("[12, 4]", "[8, 8]")
    ]


@pytest.mark.parametrize("delay", [0, 2])
def test_exchanges_that_a_script_sees_are_as_many_on_all_workers(delay: int) -> None:
    """One in each round, although exchanges of all four fragments follow the slow worker's only step of a round."""

    def positions(rank: int) -> list[int]:
        parameters = [nn.Parameter(torch.zeros(20, 30)) for _ in range(4)]
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        paces = [7, 1]
        overlap, workers = Overlap(delay, fragments=4), Workers(weight="steps", steps=paces)
        local, found = LocalUpdates(optimizer, every=4, overlap=overlap, workers=workers), list[int]()
        for _ in range(3 * paces[rank]):
            for p in parameters:
                p.grad = torch.full((20, 30), 1.0 + rank)
            optimizer.step()
            found += [local.position] * local.exchanging
        return found

    assert simulate(positions, 2) == [[8, 16, 24]] * 2


def on_paces(folder: Path, lengths: tuple[int, ...], **options: Any) -> tuple[list[int], list[int], Tensor]:
    """Load a checkpoint, if there is one; train, save; return the rounds after each step, the paces and the anchor."""
    rank = resolve(None).rank
    model = nn.Linear(40, 50)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    local = LocalUpdates(optimizer, every=6, overlap=5, workers=Workers(**{"weight": "steps"} | options))
    parts, rounds = {"model": model, "optimizer": optimizer, "local": local}, list[int]()
    load_checkpoint(folder, parts)
    for n in range(lengths[rank]):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(n + 100 * rank))
        optimizer.step()
        rounds.append(local.rounds)
    save_checkpoint(folder, parts, step=local.position)
    return rounds, local.paces, torch.cat([a.view(-1) for a in local.anchor().values()])


@pytest.mark.filterwarnings("ignore:the checkpoint of step 12 was saved by 2 workers")
def test_another_number_of_workers_continues_at_the_tick(tmp_path: Path) -> None:
    """The exchange of tick 6, saved at tick 10 of two workers that make 9 and 3 steps a round, ends at tick 11."""
    found = simulate(lambda rank: on_paces(tmp_path, (9 + 7, 3 + 2), steps=[9, 3]), 2)
    assert [rounds[-1] for rounds, _, _ in found] == [0, 0]
    later = simulate(lambda rank: on_paces(tmp_path, (8, 8, 8)), 3)
    for rounds, paces, anchor in later:
        assert rounds == [1, 1, 1, 1, 1, 1, 2, 2]
        assert paces == [6, 6, 6]
        assert torch.equal(anchor, later[0][2])
    with pytest.raises(
        CheckpointError, match="weight_by_steps is False here, but the state was saved with weight_by_steps"
    ):
        simulate(lambda rank: on_paces(tmp_path, (0, 0, 0), weight=None), 3)


def test_other_fixed_paces_begin_with_the_next_round(tmp_path: Path) -> None:
    simulate(lambda rank: on_paces(tmp_path, (7, 2), steps=[9, 3]), 2)  # at tick 4
    found = simulate(lambda rank: on_paces(tmp_path, (6, 9), steps=[4, 8]), 2)
    assert [paces for _, paces, _ in found] == [[4, 8]] * 2
    assert [rounds for rounds, _, _ in found] == [[0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1, 1]]
    assert torch.equal(found[0][2], found[1][2])
