"""The time of a step: collectives by hand, the ledger's bytes, and stragglers by Monte-Carlo."""

import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import packsaddle as ps
from lab.bench.scale import expected_maximum
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.cost_model import AllToAll, Broadcast, Cost, RingAllGather, RingAllReduce
from packsaddle.comm.group import resolve
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors.registry import compressors
from packsaddle.plan.coding import Line, Pace, measure
from packsaddle.plan.step_time import (
    FRAMING,
    Dense,
    Fleet,
    Link,
    StepTime,
    compressed,
)


def test_collectives_by_hand() -> None:
    assert RingAllReduce((100, 300)).cost(4) == Cost(6, 0, 600.0)  # 6 hops of a quarter
    assert RingAllGather(10_000).cost(4) == Cost(3, 0, 30_000)
    assert RingAllGather(100).cost(4) == Cost(1, 2, 300)  # a small one is sent to all at once
    assert RingAllGather(100).cost(2) == Cost(1, 0, 150)  # one connection: half a message, then both ways at once
    assert AllToAll([100, 100]).cost(2) == Cost(1, 0, 200)  # one connection: one way, then the other
    assert AllToAll([100, 100, 100]).cost(3) == Cost(1, 1, 300)  # between 200 and 400
    assert AllToAll([100, 0, 0, 0]).cost(4) == Cost(1, 2, 300)  # a gather: rank 0's link is hot
    assert Broadcast(100).cost(2) == Cost(1, 0, 100)
    assert Broadcast(100).cost(4) == Cost(2, 1, 300)  # 0 sends to 1 and 2 together, then 1 to 3
    assert Cost(1, 2, 3.0) + Cost(10, 20, 30.0) == Cost(11, 22, 33.0)
    for collective in (RingAllReduce((9,)), RingAllGather(9), AllToAll([9]), Broadcast(9)):
        assert collective.cost(1) == Cost()


@pytest.mark.parametrize("workers", range(1, 40))
def test_broadcast_is_gloos_tree(workers: int) -> None:
    """gloo's loop, played: whoever has the message sends it to all its children at once, over one link."""

    def play(rank: int, stage: int, now: int) -> int:
        children = [(rank + (1 << i), i + 1) for i in range(stage, 12) if rank + (1 << i) < workers]
        return max([now, *(play(child, after, now + len(children)) for child, after in children)])

    assert Broadcast(1).cost(workers).bytes == play(0, 0, 0)


PROTOCOLS: list[tuple[ps.Compressor, str]] = [
    (ps.Identity(), "direct"),
    (ps.RandomK(0.1), "direct"),
    (ps.LinearSketch(0.1), "direct"),
    (ps.SharedTopK(0.01), "direct"),
    (ps.SketchTopK(0.01), "direct"),
    (ps.LowRank(), "direct"),
    (ps.TopK(0.1), "direct"),
    (ps.AdaptiveTopK(0.5), "direct"),
    (ps.Sign(), "direct"),
    (ps.QSGD(), "direct"),
    (ps.TopK(0.1), "two-way"),
    (ps.QSGD(), "two-way"),
    (ps.TopK(0.1), "coordinator"),
    (ps.Sign(), "coordinator"),
]


@pytest.mark.parametrize(("compressor", "exchange"), PROTOCOLS, ids=str)
@pytest.mark.parametrize("workers", [2, 3, 8])
def test_the_model_moves_the_ledgers_bytes(compressor: ps.Compressor, exchange: str, workers: int) -> None:
    """Link by link: never less than the busiest worker's busier direction, nor more than all bytes one by one."""
    d, dense = 4000, 50
    protocol = choose(compressor, exchange, d=d, dense=dense, workers=workers).aggregator
    collectives = protocol.collectives(d, dense, workers, 4)
    for collective in collectives:
        wires = [collective.wire(rank, workers) for rank in range(workers)]
        moved = sum(w.sent for w in wires)
        assert moved == pytest.approx(sum(w.received for w in wires), abs=workers)
        busiest, cost = max(max(w.sent, w.received) for w in wires), collective.cost(workers).bytes
        if not moved:
            assert cost == 0
        elif isinstance(collective, RingAllReduce) or (isinstance(collective, RingAllGather) and workers > 2):
            assert cost == pytest.approx(busiest, abs=2)
        elif isinstance(collective, AllToAll):
            assert busiest <= cost <= max(w.sent + w.received for w in wires)
        else:  # the ledger counts a broadcast as a star, gloo's tree has less on one link and more in a row
            assert 0 < cost <= moved
    total = [protocol.wire(d, dense, rank, workers, 4) for rank in range(workers)]
    assert sum(t.sent for t in total) == sum(c.wire(r, workers).sent for c in collectives for r in range(workers))


@pytest.mark.parametrize("compressor", compressors(0.01), ids=str)
def test_a_hundred_billion_coordinates(compressor: ps.Compressor) -> None:
    """By formula or from a part: nothing of the vector's size is made, and a message grows as the vector."""
    small, large = (
        choose(compressor, "direct", d=d, dense=0, workers=1000).aggregator.wire(d, 0, 0, 1000, 4).sent
        for d in (25 * 10**9, 10**11)
    )
    expected = 2 if isinstance(compressor, ps.LowRank) else 4  # factors of a square, as far as it is one
    assert large / small == pytest.approx(expected, rel=0.25 if expected == 2 else 0.01)


@dataclass(frozen=True)
class Counting(ps.TopK):
    """Counts its calls by worker, with what they act on."""

    calls: ClassVar[Counter[tuple[int, str, int]]] = Counter()
    received: ClassVar[list[Any]] = []

    def encode(self, v: torch.Tensor, *, seed: int, step: int) -> Any:
        if v.any():  # not the zeros that tell the parts' names
            self.calls[resolve(None).rank, "encode", len(v)] += 1
        return super().encode(v, seed=seed, step=step)

    def receive(self, *arguments: Any, **options: Any) -> Any:
        self.received.append(message := super().receive(*arguments, **options))
        return message

    def add_decoded(self, message: Any, out: torch.Tensor, alpha: float = 1.0) -> None:
        is_received = any(message is other for other in self.received)
        self.calls[resolve(None).rank, "decode" if is_received else "add", len(out)] += 1
        super().add_decoded(message, out, alpha)


@pytest.mark.parametrize("exchange", ["direct", "two-way", "coordinator"])
def test_work_is_what_rank_0_does(exchange: str) -> None:
    """The coding of one exchange and its application, counted."""
    d, workers, c = 300, 3, Counting(0.1)
    back = c if exchange == "coordinator" else None
    Counting.calls.clear()

    def worker(rank: int) -> None:
        protocol = choose(c, exchange, d=d, dense=0, workers=workers, back=back).aggregator
        v = torch.randn(d, generator=torch.Generator().manual_seed(rank))
        averaged = protocol.average(Communicator(resolve(None), ps.Ledger()), v, v[:0], seed=0, step=0)
        for term in (*averaged.own, *averaged.mean):
            term.add_to(torch.zeros(d), 1.0)

    ps.simulate(worker, workers)
    expected: Counter[tuple[int, str, int]] = Counter()
    for work in choose(c, exchange, d=d, dense=0, workers=workers, back=back).aggregator.work(d, workers):
        for kind in ("encode", "decode", "add"):
            expected[0, kind, work.coordinates] += getattr(work, kind)
    counted = {key: n for key, n in Counting.calls.items() if key[0] == 0}
    assert counted == dict(expected)


def test_a_step_by_hand() -> None:
    """4 workers, 10 kB by RandomK: 6 hops of 0.1 ms, 15 kB at 1 MB/s, and coding as it is said to take."""
    protocol = choose(ps.RandomK(0.1), "direct", d=25_000, dense=0, workers=4).aggregator
    step = compressed(protocol, 25_000, 0, 4, lambda work: 0.001 * (work.encode + 10 * work.add))
    time = step.time(Link(1e-4, 1e6), Fleet(4, 0.05))
    assert time == StepTime(0.05, pytest.approx(0.021), pytest.approx(6e-4), pytest.approx(0.015))
    assert time.total == pytest.approx(0.0866)

    link = Link.nominal(1e8, 0.01)
    assert (link.rate, link.bits) == (1e8 / 8 * FRAMING, pytest.approx(1e8))
    assert link.parts(Cost(3, 2, 1.195e6)) == (pytest.approx(0.03002), pytest.approx(0.1, rel=1e-3))

    # To the owners at once and back in a ring; or at once, if small. Sizes that differ are sent before each message.
    for compressor, d, hops, fan in (
        (ps.Sign(), 10**6, 1 + 3, 2),
        (ps.Sign(), 8, 2, 4),
        (ps.TopK(0.1), 10**6, 1 + 3, 2),
        (ps.QSGD(), 10**6, 2 + 1 + 3, 6),
    ):
        protocol = choose(compressor, "two-way", d=d, dense=0, workers=4).aggregator
        cost = compressed(protocol, d, 0, 4, lambda work: 0.0).cost
        assert (cost.hops, cost.fan) == (hops, fan)


def schedule(dense: Dense, link: Link, fleet: Fleet, buckets: int) -> float:
    """When the last bucket arrives, if each is sent once it is ready and the one before has arrived."""
    forward, backward = fleet.compute * (1 - dense.backward), fleet.compute * dense.backward
    one = sum(link.parts(RingAllReduce((dense.nbytes // buckets,)).cost(fleet.workers)))
    now = 0.0
    for i in range(buckets):
        now = max(now, forward + backward * (i + 1) / buckets) + one
    return now


@pytest.mark.parametrize("rate", [1e6, 1e8, 3e8, 1e9, 1e11])
@pytest.mark.parametrize("buckets", [1, 4])
def test_dense_sends_beside_the_backward_pass(rate: float, buckets: int) -> None:
    dense = Dense(100 * 2**20, bucket=100 * 2**20 // buckets)
    link, fleet = Link(1e-4, rate), Fleet(4, 0.6)
    assert dense.time(link, fleet).total == pytest.approx(schedule(dense, link, fleet, buckets))
    after = replace(dense, overlap=False).time(link, fleet)
    assert after.total == pytest.approx(0.6 + buckets * 6e-4 + 1.5 * 100 * 2**20 / rate)


@pytest.mark.parametrize(("workers", "spread"), [(2, 0.3), (10, 0.1), (64, 0.5), (1000, 0.2)])
def test_the_slowest_of_many(workers: int, spread: float) -> None:
    """Against draws, within four standard errors."""
    rng, draws, sigma = np.random.default_rng(0), 4000, math.sqrt(math.log1p(spread**2))
    times = np.exp(sigma * rng.normal(size=(draws, workers)) - sigma**2 / 2)
    slowest = times.max(axis=1)
    found = expected_maximum(workers, spread)
    assert abs(found - slowest.mean()) < 4 * slowest.std() / math.sqrt(draws)
    assert found > 1 + spread / 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Link(0.1, 0.0), "rate of a link must be positive, in bytes a second, got 0.0"),
        (lambda: Fleet(0, 1.0), "workers must be at least 1, got 0"),
        (lambda: Fleet(2, -0.5), "compute must be from 0 to 1e+09, got -0.5"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_pace() -> None:
    assert Line.through((10, 3.0), (30, 5.0)) == Line(2.0, 0.1)
    assert Line.through((10, 3.0), (10, 3.0)) == Line(0.0, 0.3)  # a vector so short that there is one point
    assert Line.through((10, 3.0), (30, 2.0)) == Line(2.0, 0.0)  # a machine that was busy at first
    pace = Pace(Line(1.0, 0.0), Line(0.0, 0.1), Line(0.0, 0.01))
    works = choose(ps.TopK(0.1), "direct", d=100, dense=0, workers=5).aggregator.work(100, 5)
    assert sum(map(pace.seconds, works)) == pytest.approx(1.0 + 4 * 10 + 2 * 1)
    timed = measure(ps.TopK(k=50), 20_000, repeats=2)
    assert timed.encode.at(20_000) > 0
    with pytest.raises(ValueError, match="k of TopK must be at most d = 10"):
        measure(ps.TopK(k=50), 10)
