"""Every compressor through every protocol, for 1 to 8 workers: means, conservation at both ends, bytes, choice."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import problems
import pytest
import torch
from exchanges import decoded as decode
from exchanges import exchanged
from torch import Tensor

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    Identity,
    Ledger,
    LinearSketch,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
    simulate,
)
from packsaddle.comm.aggregators import Aggregator, AllGather, Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.cost_model import RingAllGather
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Bytes
from packsaddle.comm.select_aggregator import choose
from packsaddle.feedback.noise import Noise
from packsaddle.numerics.seeds import mix

# Compressor, exchange, compressor of the way back.
CASES: list[tuple[Compressor, str, Compressor | None]] = [
    (Identity(), "direct", None),
    (Identity(), "all-gather", None),
    (Identity(), "two-way", None),
    (Identity(), "coordinator", None),
    (RandomK(0.25), "all-reduce", None),
    (RandomK(0.5, block_size=2), "direct", None),
    (RandomK(0.25), "two-way", TopK(0.5)),
    (TopK(0.25), "all-gather", None),
    (TopK(k=3), "two-way", None),
    (TopK(0.25, values="int8"), "coordinator", TopK(0.5)),
    (AdaptiveTopK(0.6), "direct", None),
    (AdaptiveTopK(0.6), "two-way", Sign()),
    (SharedTopK(k=3, projections=1, half=False), "direct", None),
    (SharedTopK(0.2, block_size=4, projections=1, half=False), "direct", None),
    (SketchTopK(k=3), "direct", None),
    (SketchTopK(k=1, rows=3, columns=4, half=False), "direct", None),
    (Sign(), "direct", None),
    (Sign(per_tensor=True), "direct", None),
    (Sign(), "two-way", None),
    (Sign(), "coordinator", Sign()),
    (TopK(0.25, values="int2", chunk=64), "direct", None),
    (TopK(0.25, values="int2", chunk=64), "two-way", None),
    (QSGD(levels=3), "direct", None),
    (QSGD(levels=3), "two-way", None),
    (QSGD(levels=3), "coordinator", None),
    (QSGD(levels=3, coded=False), "direct", None),
    (QSGD(levels=3, coded=False), "two-way", None),
    (QSGD(levels=3, coded=False), "coordinator", None),
    (LinearSketch(0.3), "direct", None),
    (LinearSketch(columns=1), "two-way", None),
    (LowRank(), "direct", None),
]
by_case = pytest.mark.parametrize(
    ("compressor", "exchange", "back"), CASES, ids=[f"{c} {e} {b or ''}" for c, e, b in CASES]
)
# One case of every aggregator.
ONE_OF_EACH = {choose(c, e, d=problems.D, dense=0, workers=3, back=b).name: (c, e) for c, e, b in CASES}


@by_case
def test_y_recursion(compressor: Compressor, exchange: str, back: Compressor | None) -> None:
    """y_{t+1} = y_t - eta (mean_i grad F_i(x_t) + xi_t), with e the errors at both ends: every protocol conserves.

    With 3 workers; one case of each aggregator with 1 and with 8 as well.
    """
    eta, r, steps = 0.02, 0.1, 8
    arguments: dict[str, Any] = {"steps": steps, "lr": eta, "noise": r, "seed": 4, "exchange": exchange, "back": back}
    for workers in (1, 3, 8) if (compressor, exchange) in ONE_OF_EACH.values() else (3,):
        runs = simulate(lambda rank: problems.run(compressor, **arguments), workers)
        x, y = runs[0]["x"], runs[0]["y"]
        noise = [Noise(r).vector(x[t], seed=4, step=t) for t in range(steps)]
        gradients = [problems.gradient(i) for i in range(workers)]
        for t in range(steps):
            mean_gradient = sum(gradient(x[t]) for gradient in gradients) / workers
            assert torch.allclose(y[t + 1], y[t] - eta * (mean_gradient + noise[t]), rtol=1e-11, atol=1e-12), workers
        for run in runs:
            assert torch.equal(run["x"], x)
            assert torch.allclose(run["y"], y, rtol=1e-11, atol=1e-12)
            if not isinstance(compressor, Identity) and (workers > 1 or exchange != "coordinator" or back):
                assert run["e"][-1].any()


def all_toys() -> list[dict[str, Any]]:
    """Every case, with resets, in the present group."""
    return [problems.run(c, steps=6, noise=0.2, lr=0.02, interval=3, exchange=e, back=b) for c, e, b in CASES]


def test_processes_equal_the_simulation(gloo: Callable[..., list[Any]]) -> None:
    simulated = simulate(lambda rank: all_toys(), 3)
    for real, serial in zip(gloo(all_toys, 3), simulated, strict=True):
        for case, a, b in zip(CASES, real, serial, strict=True):
            for quantity in ("x", "e", "y", "own"):
                assert torch.allclose(a[quantity], b[quantity], rtol=1e-7, atol=1e-9), (case, quantity)
            assert (a["resets"], a["bytes"]) == (b["resets"], b["bytes"]), case
            assert a["resets"], case


def vectors(d: int, workers: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return each worker's vector; they share a trend, as gradients do."""
    trend = torch.randn(d, generator=torch.Generator().manual_seed(99))
    noise = [torch.randn(d, generator=torch.Generator().manual_seed(i)) for i in range(workers)]
    return [(trend + n).to(dtype) for n in noise]


def exchange_once(
    compressor: Compressor, exchange: str, back: Compressor | None, d: int, dense: int, workers: int, steps: int = 1
) -> list[dict[str, Any]]:
    """Average vectors of d + dense coordinates `steps` times by themselves; return what every worker saw last."""
    settings: dict[str, Any] = {"exchange": exchange, "back": back, "dense": dense, "steps": steps}
    return simulate(lambda rank: exchanged(compressor, vectors(d, workers), **settings), workers)


@by_case
def test_any_size(compressor: Compressor, exchange: str, back: Compressor | None) -> None:
    """W from 1 to 8 and any d: workers agree, the mean of own is the mean, the dense part is averaged.

    Every W for one case of each aggregator, and 1, 3 and 8 for the others.
    """
    one_of_each = (compressor, exchange) in ONE_OF_EACH.values()
    for d, dense in [(0, 4), (1, 0), (3, 1), (97, 5)]:
        if d and isinstance(compressor, RandomK | TopK | SketchTopK | SharedTopK):
            d = max(d, compressor.k or 0)  # k > d is refused at construction
        for workers in range(1, 9) if one_of_each else (1, 3, 8):
            results = exchange_once(compressor, exchange, back, d, dense, workers)
            sent = sum(r["own"] for r in results) / workers
            for r in results:
                assert torch.equal(r["mean"], results[0]["mean"]), (workers, d)
                assert torch.allclose(r["mean"], sent, rtol=1e-5, atol=1e-5), (workers, d)
                assert r["dense"].tolist() == pytest.approx([(workers - 1) / 2] * dense), (workers, d)


@by_case
def test_predicted_bytes_are_counted(compressor: Compressor, exchange: str, back: Compressor | None) -> None:
    """To the byte, except for coded levels, whose sizes are random, as is AdaptiveTopK's k."""
    d, kinds = 4000, [c for c in (compressor, back) if c is not None]
    levels = any(isinstance(c, QSGD) and c.coded for c in kinds)
    coded = levels or any(isinstance(c, AdaptiveTopK) for c in kinds)
    # What one worker's levels decode to is mostly 0, and takes fewer bytes on its way back than a Gaussian vector.
    share = 0.25 if levels and exchange == "two-way" else 0.15
    for r in (r for workers in (1, 2, 3, 5) for r in exchange_once(compressor, exchange, back, d, 50, workers)):
        counted, predicted = r["bytes"], r["predicted"]
        for name in ("payload", "sent", "received"):
            a, b = getattr(counted, name), getattr(predicted, name)
            assert a == pytest.approx(b, rel=share, abs=100) if coded else a == b, (name, a, b)


@pytest.mark.parametrize(("compressor", "d", "sizes"), [(QSGD(), 4000, 16), (TopK(0.1), 4000, 0), (QSGD(), 0, 0)])
def test_the_sizes_of_messages_are_predicted(compressor: Compressor, d: int, sizes: int) -> None:
    """8 bytes for each part whose size varies."""
    assert AllGather(compressor).collectives(d, 0, 2, 4)[0] == RingAllGather(sizes)


def test_gathered_mean_is_the_mean_of_compressions() -> None:
    workers, d = 3, 60
    vs = vectors(d, workers)
    for c in (TopK(0.1), Sign(), AdaptiveTopK(0.5)):
        for r in exchange_once(c, "all-gather", None, d, 0, workers):
            assert torch.allclose(r["mean"], sum(c(v, seed=7) for v in vs) / workers, atol=1e-6)
    private = exchange_once(QSGD(levels=2), "all-gather", None, d, 0, workers)
    expected = sum(QSGD(levels=2)(v, seed=mix(7, i + 1)) for i, v in enumerate(vs)) / workers
    assert torch.allclose(private[0]["mean"], expected, atol=1e-6)


@pytest.mark.parametrize("c", [RandomK(0.2), LinearSketch(0.2), Identity()], ids=repr)
def test_linear_mean_is_the_compression_of_the_mean(c: Compressor) -> None:
    workers, d = 4, 60
    mean = sum(vectors(d, workers)) / workers
    for r in exchange_once(c, "direct", None, d, 0, workers):
        assert torch.allclose(r["mean"], c(mean, seed=7), atol=1e-5)


def test_sketched_support_is_global() -> None:
    """A coordinate that is large in the mean and in no worker is found, and its exact mean is sent."""
    workers, d, c = 4, 300, SketchTopK(k=1, rows=5, columns=100)
    local = [torch.zeros(d) for _ in range(workers)]
    for i, v in enumerate(local):
        v[7] = 1.0
        v[20 + i], v[20 + (i + 1) % workers] = 3.0, -3.0  # largest on the worker, cancel in the mean

    def worker(rank: int) -> Averaged:
        protocol = choose(c, "direct", d=d, dense=0, workers=workers).aggregator
        return protocol.average(Communicator(resolve(None), Ledger()), local[rank], torch.zeros(0), seed=7, step=0)

    for averaged in simulate(worker, workers):
        assert decode(averaged.mean, d).nonzero().tolist() == [[7]]
        assert decode(averaged.own, d)[7] == decode(averaged.mean, d)[7] == 1.0
    assert all(TopK(k=1)(v)[7] == 0 for v in local)


def test_two_way_by_hand() -> None:
    """Chunk by chunk: the owner averages its own vector as it is, and is left with W times the mean's residual."""
    workers, d, up, back = 3, 31, TopK(0.3), TopK(0.2)
    vs, mean, left = vectors(d, workers), torch.zeros(d), torch.stack(vectors(d, workers))
    for owner, (a, b) in enumerate(pairwise([0, 10, 20, 31])):
        sent = [v[a:b] if i == owner else up(v[a:b]) for i, v in enumerate(vs)]
        mean[a:b] = back(torch.stack(sent).mean(0))
        for i, part in enumerate(sent):
            left[i, a:b] = torch.stack(sent).sum(0) - workers * mean[a:b] if i == owner else vs[i][a:b] - part
    for v, rest, r in zip(vs, left, exchange_once(up, "two-way", back, d, 0, workers), strict=True):
        assert torch.allclose(r["mean"], mean, atol=1e-6)
        assert torch.allclose(v - r["own"], rest, atol=1e-6)


def test_low_rank_by_hand() -> None:
    """PowerSGD: P = orth(mean M Q), then mean M^T P; the second step starts from the first's, and some Gaussian."""
    workers, shape = 3, (12, 9)
    c = LowRank(2).for_tensors([torch.Size(shape)])
    ms = [v.view(shape) for v in vectors(108, workers)]
    mean = sum(ms) / workers
    q = c.gaussian(vectors(108, 1)[0], seed=7, step=0)[0]
    for step in range(2):
        if step:
            q = q / q.abs().max() + 0.1 * c.gaussian(vectors(108, 1)[0], seed=7, step=step)[0]
        p = torch.linalg.qr(mean @ q).Q
        q = mean.T @ p
    for m, r in zip(ms, exchange_once(c, "direct", None, 108, 0, workers, steps=2), strict=True):
        assert torch.allclose(r["mean"].view(shape), p @ q.T, atol=1e-4)
        assert torch.allclose(r["own"].view(shape), p @ p.T @ m, atol=1e-4)


def test_low_rank_finds_a_direction_that_comes_late() -> None:
    """A warm start alone would keep e_1 for ever, and the error along e_2 would grow with the steps."""
    protocol = choose(LowRank().for_tensors([torch.Size((8, 8))]), "direct", d=64, dense=0, workers=1).aggregator
    channel, error = Communicator(resolve(None), Ledger()), torch.zeros(8, 8)
    for step in range(300):
        gradient = torch.diag(torch.tensor([1.0, float(step > 0)] + [0.0] * 6))
        v = (error + gradient).flatten()
        error = (v - decode(protocol.average(channel, v, v[:0], seed=0, step=step).own, 64)).view(8, 8)
        assert float(error.abs().max()) < 60


def test_columns_and_scales_go_with_the_chunk() -> None:
    """Two-way splits columns= among chunks; the coordinator's one chunk is the whole vector, tensors and all."""
    whole = choose(LinearSketch(columns=100), "direct", d=1600, dense=0, workers=8).aggregator.wire(1600, 0, 0, 8, 4)
    split = choose(LinearSketch(columns=100), "two-way", d=1600, dense=0, workers=8).aggregator.wire(1600, 0, 0, 8, 4)
    assert whole.payload == 400
    assert 400 <= split.payload <= 2 * 430
    v = torch.cat([torch.ones(10), torch.full((30,), 100.0)])
    sign = Sign(per_tensor=True).for_tensors([torch.Size((10,)), torch.Size((30,))])
    protocol = choose(sign, "coordinator", d=40, dense=0, workers=1).aggregator
    averaged = protocol.average(Communicator(resolve(None), Ledger()), v, v[:0], seed=0, step=0)
    assert torch.allclose(decode(averaged.mean, 40), v)


def test_owners_chunks_keep_the_tensors() -> None:
    """Tensors of 10, 3 and 27, chunks of 13, 13 and 14: a scale for each part of a tensor in a chunk, but all for its
    owner."""
    sizes, parts, workers, d = (10, 3, 27), (10, 3, 13, 14), 3, 40
    shapes = [torch.Size((n,)) for n in sizes]
    signs = exchange_once(Sign(per_tensor=True).for_tensors(shapes), "two-way", Identity(), d, 0, workers)
    for rank, (v, one) in enumerate(zip(vectors(d, workers), signs, strict=True)):
        for owner, part, found in zip((0, 0, 1, 2), v.split(parts), one["own"].split(parts), strict=True):
            expected = part if owner == rank else part.abs().mean() * torch.where(part >= 0, 1.0, -1.0)
            assert torch.allclose(found, expected)
        assert one["bytes"].sent == one["predicted"].sent
    busiest = max(one["bytes"].sent for one in signs)
    assert signs[0]["protocol"].most_sent(d, 0, workers, 4) == busiest > min(one["bytes"].sent for one in signs)
    assert torch.allclose(signs[0]["mean"], sum(r["own"] for r in signs) / workers, atol=1e-6)
    assert LowRank(2).for_tensors(shapes).restrict(0, 13, d).shapes == ()


def test_mu_counts_both_ways() -> None:
    """Equal magnitudes, TopK with a ratio that rounds in each chunk: the stated share is the measured one."""
    c = TopK(0.0118)
    for back, expected in ((Identity(), 8 / 1000), (TopK(0.5), 8 / 1000 * 0.496)):
        protocol = choose(c, "two-way", d=1000, dense=0, workers=8, back=back).aggregator
        assert protocol.mu(1000, 8) == pytest.approx(expected, rel=0.02)
    with pytest.raises(ValueError, match=r"k of TopK must be at most d = 10"):
        choose(TopK(0.5), "two-way", d=10, dense=0, workers=2, back=TopK(k=11))


def test_coordinator_bytes_are_rank_0s() -> None:
    """The star: others send one message and receive d floats; rank 0 receives W - 1 messages and sends d to each."""
    workers, d, header = 4, 400, 8
    results = [r["bytes"] for r in exchange_once(Identity(), "coordinator", None, d, 0, workers)]
    vector = 4 * d
    assert results[0] == Bytes(vector + vector + header, 3 * (vector + header), 3 * vector)
    for other in results[1:]:
        assert other == Bytes(vector, vector, vector + header)


def test_choice() -> None:
    def pick(compressor: Compressor, workers: int, exchange: str = "auto", d: int = 10_000) -> str:
        return choose(compressor, exchange, d=d, dense=0, workers=workers).name

    assert pick(RandomK(0.01), 8) == "all-reduce"
    assert pick(TopK(0.01), 2) == "all-gather"
    assert pick(TopK(0.01), 8) == "two-way"
    assert pick(Sign(), 8) == "two-way"
    assert pick(SketchTopK(0.01), 8) == "sketched all-reduce"
    assert pick(SharedTopK(0.01), 8) == "projected all-reduce"
    assert pick(LowRank(), 8) == "low-rank all-reduce"
    assert pick(TopK(0.01), 8, "direct") == "all-gather"
    assert pick(TopK(k=1), 8, d=3) == "all-gather"
    assert all(pick(c, 2, d=0) for c in (RandomK(k=3), LinearSketch(columns=3), TopK(0.1)))  # nothing is compressed
    reason = choose(TopK(0.01), "auto", d=10_000, dense=0, workers=8).reason
    assert "bytes sent per exchange by the busiest worker; all-gather" in reason


def test_refusals() -> None:
    def make(compressor: Compressor, exchange: str, back: Compressor | None = None) -> Aggregator:
        return choose(compressor, exchange, d=10, dense=0, workers=2, back=back).aggregator

    with pytest.raises(ValueError, match=r'"all-reduce" needs a linear compressor, and TopK'):
        make(TopK(0.1), "all-reduce")
    with pytest.raises(ValueError, match="exchange of LowRank is its own low-rank all-reduce"):
        make(LowRank(), "two-way")
    with pytest.raises(ValueError, match='back is for exchange "two-way" or "coordinator", not \'direct\''):
        make(TopK(0.1), "direct", TopK(0.1))


def test_state_of_protocols() -> None:
    """Warm starts are part of the state: a restored protocol goes on as if it had not stopped."""
    for compressor, exchange in ((TopK(0.3), "two-way"), (LowRank(), "direct")):

        def worker(rank: int, c: Compressor = compressor, e: str = exchange) -> tuple[Tensor, Tensor]:
            channel = Communicator(resolve(None), Ledger())
            bound = c.for_tensors([torch.Size((6, 5))])
            first, second = (choose(bound, e, d=30, dense=0, workers=2).aggregator for _ in range(2))

            def run(protocol: Aggregator, step: int) -> Averaged:
                return protocol.average(channel, vectors(30, 2)[rank], torch.zeros(0), seed=1, step=step)

            run(first, 0)
            second.load_state_dict(first.state_dict(), torch.device("cpu"))
            return decode(run(first, 1).mean, 30), decode(run(second, 1).mean, 30)

        for a, b in simulate(worker, 2):
            assert torch.equal(a, b)
