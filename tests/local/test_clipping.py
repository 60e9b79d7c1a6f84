"""Clipped updates: what they cost, what they are compared with, and the law y = a - mean e, in which they cancel.

Whole runs with a limit are compared with the twin in tests/feedback/engine/test_random_local_updates.py.
"""

import logging
import math
from typing import Any

import pytest
import torch
from elastic_fakes import Worker
from torch import Tensor

from packsaddle import Clip, Compression, Compressor, Identity, TopK, simulate
from packsaddle.comm import resolve
from packsaddle.integrations import measures
from packsaddle.local.round import factors_of

GATHERED = Compression(TopK(0.25), "direct", dense_below=7)


class Loud(Worker):
    """A worker; that of rank 2 has 50 times the gradients."""

    def gradients(self) -> None:
        super().gradients()
        for p in self.parameters:
            if self.rank == 2 and p.grad is not None:
                p.grad.mul_(50.0)


def begun(*, elastic: bool = False, **options: Any) -> Worker:
    """Return this worker, which has joined the others if they are elastic."""
    if elastic:
        worker = Loud(resolve(None), settings={"clip": 2.0}, **options)
        worker.local.join()
        return worker
    return Loud(resolve(None), elastic=False, clip=2.0, **options)


@pytest.mark.parametrize(
    ("norms", "factors"),
    [
        ([1.0, 8.0, 2.0, math.nan, math.nan], [1.0, 0.5, 1.0, 1.0, 1.0]),  # NaN: not in the round
        ([1.0, 2.0, 8.0, 64.0], [1.0, 1.0, 0.5, 1 / 16]),  # of the two in the middle, the smaller
        ([1.0, 64.0], [1.0, 1.0]),  # two are no majority
        ([0.0, 0.0, 5.0], [1.0, 1.0, 1.0]),  # workers that stand still do not count
        ([0.0, 1.0, 1.0, 8.0], [1.0, 1.0, 1.0, 0.25]),
        ([1.0, 1.0, math.inf], [1.0, 1.0, 0.0]),
        ([0.0, 0.0, 0.0], [1.0] * 3),
        ([math.nan, math.nan], [1.0, 1.0]),
    ],
)
def test_the_median_is_over_the_workers_of_the_round(norms: list[float], factors: list[float]) -> None:
    assert factors_of(torch.tensor(norms), 2.0).tolist() == factors


def test_a_log_line_names_worker_and_factor(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "packsaddle")

    def work(rank: int) -> list[Clip]:
        worker = begun(compressor=GATHERED)
        worker.train(15)
        assert measures(worker.local)["clipped"] == 5.0
        return worker.local.clips

    clips, *_ = simulate(work, 5)
    lines = [record.getMessage() for record in caplog.records if "was too long" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["round 0", "round 1", "round 3"]  # consecutive: 1, 2, 4
    assert f"the update of worker 2 was too long, and is scaled by {clips[0].factor:.3g}; the rest" in lines[0]
    assert ["in a row" in line for line in lines] == [False, True, True]
    assert lines[2].endswith("(4 in a row)")


@pytest.mark.parametrize("compressor", [TopK(0.25), Identity()], ids=repr)
def test_elastic_workers_lose_nothing(compressor: Compressor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "packsaddle")

    def work(rank: int) -> dict[str, Any]:
        worker = begun(elastic=True, compressor=Compression(compressor, dense_below=7))
        start = worker.anchor()
        worker.train(15)  # the flush follows a round, after which some workers have nothing to send
        found = {"start": start, "clips": worker.local.clips, "moved": worker.moved}
        found |= {"name": f"{worker.local._workers.member.worker:x}", "pending": worker.local.pending()}  # type: ignore[union-attr]
        found["anchor"] = worker.anchor()
        worker.local.flush()
        return found | {"flushed": worker.anchor(), "x": worker.x(), "rest": worker.local.pending()}

    found = simulate(work, 4)
    mean = sum(run["moved"] for run in found) / 4
    for when, rest in (("anchor", "pending"), ("flushed", "rest")):
        unsent = sum(run[rest] for run in found) / 4
        torch.testing.assert_close(found[0][when] - unsent, found[0]["start"] - mean, rtol=1e-12, atol=1e-12)
    for run in found:
        assert [clip.worker for clip in run["clips"]] == [found[2]["name"]] * 5
        assert torch.equal(run["x"], found[0]["flushed"])
    assert f"the update of worker {found[2]['name']} was too long" in caplog.text


def test_a_failed_elastic_round_clips_nothing() -> None:
    """Its attempt is repeated, and recorded once."""

    def work(rank: int, refused: bool) -> tuple[list[Tensor], list[tuple[int, float]]]:
        worker = begun(elastic=True)
        worker.train(5)
        if refused:
            worker.manager.refused = {worker.manager.votes}
        worker.train(7)
        assert worker.manager.votes == 5 + refused
        return worker.everything(), [(clip.step, clip.factor) for clip in worker.local.clips]

    disturbed, plain = (simulate(lambda rank, r=refused: work(rank, r), 3) for refused in (True, False))
    for (mine, clips), (theirs, expected) in zip(disturbed, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert clips == expected
        assert len(clips) == 4
