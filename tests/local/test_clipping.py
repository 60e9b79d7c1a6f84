"""Clipped updates: against a naive twin, and the law y = a - mean e, in which clipping must not appear."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from elastic_fakes import Worker
from specs import local_options
from torch import Tensor, nn

from packsaddle import (
    QSGD,
    Clip,
    Compression,
    Compressor,
    Identity,
    LocalUpdates,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    TopK,
    Workers,
    simulate,
)
from packsaddle.comm import Solo, resolve
from packsaddle.integrations import measures
from packsaddle.local.clipping import Standing, factors_of

W, LR = 5, 0.1
LOUD = 3  # the worker whose gradients are larger
Gloo = Callable[..., list[Any]]


def gradient(worker: int, step: int, shape: tuple[int, ...], loud: float) -> Tensor:
    rng = torch.Generator().manual_seed(1000 * worker + step)
    return torch.randn(shape, dtype=torch.float64, generator=rng) * (loud if worker == LOUD else 1.0)


class Run:
    """This worker's training of a matrix and a vector, which is sent uncompressed, with gradients that are given."""

    def __init__(self, *, loud: float = 100.0, dtype: torch.dtype = torch.float64, **options: Any) -> None:
        self.rank, self.loud = resolve(None).rank, loud
        self.parameters = [nn.Parameter(torch.linspace(-1, 1, 48, dtype=torch.float64).view(6, 8).to(dtype))]
        self.parameters.append(nn.Parameter(torch.ones(5, dtype=dtype)))
        self.optimizer = torch.optim.SGD(self.parameters, lr=LR)
        self.local = LocalUpdates(self.optimizer, **local_options(every=4, dense_below=6, **options))
        self.moved = torch.zeros(53, dtype=torch.float64)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            for p in self.parameters:
                p.grad = gradient(self.rank, self.local.steps, tuple(p.shape), self.loud).to(p.dtype)
            self.moved += LR * torch.cat([p.grad.reshape(-1) for p in self.parameters if p.grad is not None])
            self.optimizer.step()

    def x(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1).clone() for p in self.parameters])

    def anchor(self) -> Tensor:
        return torch.cat([a.reshape(-1) for a in self.local.anchor().values()])


CASES: dict[str, dict[str, Any]] = {
    "gathered": {"compressor": TopK(0.2), "exchange": "direct"},
    "gathered, from the anchor": {"compressor": TopK(0.2), "exchange": "direct", "keep_unsent": False},
    "sign by owners": {"compressor": Sign(), "exchange": "two-way"},
    "coordinator": {"compressor": TopK(0.2), "exchange": "coordinator"},
    "all-reduced": {"compressor": RandomK(0.3), "exchange": "direct"},
    "low rank": {"compressor": LowRank(1), "exchange": "direct"},
    "shared": {"compressor": SharedTopK(0.3), "exchange": "direct"},
    "quantized": {"compressor": QSGD(3), "exchange": "direct"},
    "uncompressed": {"compressor": Identity()},
    "weights": {"compressor": TopK(0.2), "exchange": "direct"},
    "delay": {"compressor": TopK(0.2), "exchange": "direct", "delay": 2},
    "delay, owners, fragments": {"compressor": Sign(), "exchange": "two-way", "delay": 1, "fragments": 2},
    "fragments": {"compressor": TopK(0.2), "fragments": 2},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep", [True, False])
def test_sixteen_bits(dtype: torch.dtype, keep: bool) -> None:
    """Steps are rounded, so the law is checked from one exchange to the next: error() counts all that x has done."""

    def work(rank: int) -> list[tuple[Tensor, bool]]:
        run = Run(clip=2.0, loud=50.0, dtype=dtype, compressor=TopK(0.2), exchange="direct", keep_unsent=keep)
        run.train(3)
        y, found = run.anchor() - run.local.error(), []
        for _ in range(3):
            for p in run.parameters:  # a step without a move: the exchange and nothing else
                p.grad = torch.zeros_like(p)
            run.optimizer.step()
            clipped = run.local.clipped
            found.append((run.anchor() - run.local.error() - y, clipped > 0))
            run.train(3)
            y = run.anchor() - run.local.error()
        assert run.local.flush(Identity())
        found.append((run.anchor() - run.local.error() - y, True))
        return found

    for found in simulate(work, W):
        for change, clipped in found:
            assert clipped
            assert change.abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_without_an_outlier_nothing_changes(case: str) -> None:
    """Bit for bit, and the only other bytes are the norms: four of each worker in a round."""

    def work(rank: int, clip: float | None) -> tuple[list[Tensor], int, int, int]:
        weight = {"weight": 1.0 + rank} if case == "weights" else {}
        run = Run(loud=1.0, clip=clip, **CASES[case], **weight)
        run.train(22)
        state = [run.x(), run.anchor(), run.local.pending()]
        run.local.flush()
        sent = run.local.ledger.by_purpose["guard"].sent
        return [*state, run.x()], sent, run.local.rounds, run.local.clipped

    for (mine, sent, rounds, clipped), (plain, alone, *_) in zip(
        simulate(lambda rank: work(rank, 100.0), W), simulate(lambda rank: work(rank, None), W), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
        assert clipped == 0
        assert sent - alone == (rounds + 1) * 4 * (W - 1)  # and the check of the first step


ABSENT, LIMITED, COUNTED = Standing
MEDIANS: list[tuple[list[float], list[Standing], list[float]]] = [
    ([1.0, 8.0, 2.0, 9.0, 0.0], [COUNTED] * 3 + [ABSENT] * 2, [1.0, 0.5, 1.0, 1.0, 1.0]),
    ([1.0, 64.0], [COUNTED] * 2, [1.0, 1 / 32]),  # of two, the smaller
    ([0.0, 0.0, 5.0], [COUNTED] * 3, [1.0, 1.0, 0.0]),
    ([1.0, 1.0, math.inf], [COUNTED] * 3, [1.0, 1.0, 0.0]),
    ([0.0, 0.0, 0.0], [COUNTED] * 3, [1.0] * 3),
    # Workers that have ended are limited, but not counted.
    ([1.0, 0.0, 8.0, 8.0, 1.0], [COUNTED, LIMITED, COUNTED, LIMITED, COUNTED], [1.0, 1.0, 0.25, 0.25, 1.0]),
    ([5.0, 6.0], [ABSENT, ABSENT], [1.0, 1.0]),
]


@pytest.mark.parametrize(("norms", "standings", "factors"), MEDIANS)
def test_the_median_is_over_the_workers_of_the_round(
    norms: list[float], standings: list[Standing], factors: list[float]
) -> None:
    assert factors_of(torch.tensor(norms), torch.tensor(standings), 2.0).tolist() == factors


def test_a_log_line_names_worker_and_factor(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "packsaddle")

    def work(rank: int) -> float:
        run = Run(clip=2.0, compressor=TopK(0.2), exchange="direct")
        run.train(20)
        return measures(run.local)["clipped"]

    assert simulate(work, W) == [5.0] * W
    lines = [record.getMessage() for record in caplog.records if "was too long" in record.getMessage()]
    assert [line.split(":")[0] for line in lines] == ["round 0", "round 1", "round 3"]  # consecutive: 1, 2, 4
    assert f"the update of worker {LOUD} was too long, and is scaled by 0.02" in lines[0]
    assert "in a row" not in lines[0]
    assert lines[2].endswith("(4 in a row)")


def test_an_update_that_is_not_finite_is_not_counted() -> None:
    def work(rank: int) -> tuple[int, int, int]:
        run = Run(clip=2.0, compressor=TopK(0.2), exchange="direct")
        run.train(3)
        if rank == 1:
            run.parameters[0].data.fill_(float("nan"))
        run.train(1)
        return run.local.rounds, run.local.skipped, run.local.clipped

    assert simulate(work, W) == [(0, 1, 0)] * W


@pytest.mark.parametrize("value", [0, 0.5, float("inf"), float("nan"), True, "2"])
def test_a_limit_is_at_least_one(value: Any) -> None:
    with pytest.raises(ValueError, match="clip must be finite and at least 1, or None, got"):
        Workers(clip=value)


def test_one_worker_is_never_clipped() -> None:
    run = Run(clip=1.0, compressor=TopK(0.2))
    run.train(9)
    assert run.local.flush()
    assert run.local.clips == []
    assert not run.local.pending().any()


def real(rank_zero: Compressor) -> tuple[list[Tensor], list[Clip]]:
    run = Run(clip=2.0, compressor=rank_zero, exchange="direct", delay=1)
    run.train(13)
    return [run.anchor(), run.local.pending()], run.local.clips


def test_processes_agree_with_simulated_workers(gloo: Gloo) -> None:
    processes, threads = gloo(real, 4, TopK(0.2)), simulate(lambda _: real(TopK(0.2)), 4)
    for (mine, clips), (theirs, expected) in zip(processes, threads, strict=True):
        assert clips == expected
        assert len(clips) == 3
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Workers that come and go.


class Loud(Worker):
    """An elastic worker; that of rank 2 has 50 times the gradients."""

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.gradients()
            grads = [p.grad for p in self.parameters if p.grad is not None]
            for grad in grads:
                grad.mul_(50.0 if self.rank == 2 else 1.0)
            self.moved += 0.1 * torch.cat([grad.reshape(-1) for grad in grads])
            self.optimizer.step()


@pytest.mark.parametrize("compressor", [TopK(0.25), Identity()], ids=repr)
def test_elastic_workers(compressor: Compressor, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "packsaddle")

    def work(rank: int) -> dict[str, Any]:
        worker = Loud(resolve(None), settings={"clip": 2.0}, compressor=Compression(compressor, dense_below=7))
        worker.local.join()
        start = worker.anchor()
        worker.train(15)  # the flush follows a round, after which some workers have nothing to send
        membership = worker.local._workers
        assert membership is not None
        found = {"start": start, "name": f"{membership.worker:x}", "clips": worker.local.clips, "moved": worker.moved}
        found["pending"] = worker.local.pending()
        found["anchor"] = worker.anchor()
        worker.local.flush()
        return found | {"flushed": worker.anchor(), "x": worker.x(), "rest": worker.local.pending()}

    found = simulate(work, 4)
    mean = sum(run["moved"] for run in found) / 4
    for when, rest in (("anchor", "pending"), ("flushed", "rest")):
        unsent = sum(run[rest] for run in found) / 4
        torch.testing.assert_close(found[0][when] - unsent, found[0]["start"] - mean, rtol=1e-12, atol=1e-12)
    for run in found:
        assert {clip.worker for clip in run["clips"]} == {found[2]["name"]}
        assert len(run["clips"]) == 5
        assert torch.equal(run["x"], found[0]["flushed"])
    assert f"the update of worker {found[2]['name']} was too long" in caplog.text


def test_elastic_workers_without_an_outlier() -> None:
    def work(rank: int, clip: float | None) -> tuple[list[Tensor], int]:
        worker = Worker(resolve(None), settings={"clip": clip})
        worker.local.join()
        worker.train(15)
        return worker.everything(), worker.local.ledger.total.sent

    on, off = (simulate(lambda rank, c=clip: work(rank, c), 3) for clip in (50.0, None))
    for (mine, sent), (plain, alone) in zip(on, off, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))
        assert sent - alone == 5 * 4 * 2  # the join sends nothing


def test_a_failed_elastic_round_clips_nothing() -> None:
    """Its attempt is repeated, and recorded once."""

    def work(rank: int, refused: bool) -> tuple[list[Tensor], list[Clip]]:
        worker = Loud(resolve(None), settings={"clip": 2.0})
        worker.local.join()
        worker.train(5)
        if refused:
            worker.manager.refused = {worker.manager.votes}
        worker.train(7)
        assert worker.manager.votes == 5 + refused
        return worker.everything(), worker.local.clips

    disturbed, plain = (simulate(lambda rank, r=refused: work(rank, r), 3) for refused in (True, False))
    for (mine, clips), (theirs, expected) in zip(disturbed, plain, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
        assert [(clip.step, clip.factor) for clip in clips] == [(clip.step, clip.factor) for clip in expected]
        assert len(clips) == 4


def test_an_elastic_limit_is_checked() -> None:
    with pytest.raises(ValueError, match="clip must be finite and at least 1"):
        Worker(Solo(), settings={"clip": 0.5})
