"""The engine alone: a round conserves the updates to be applied, and a rejected one leaves no trace."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from packsaddle import CompressedSGD, Compression, Compressor, Ledger, LowRank, RandomK, Sign, TopK, simulate
from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.feedback.checks import Contraction
from packsaddle.feedback.guard import Guard
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.report import Report
from packsaddle.feedback.round import ErrorFeedback
from packsaddle.feedback.slices import Shaped, Slice, places

SHAPES = {"w": (9, 7), "b": (5,)}  # b is a vector, and goes dense
D, COMPRESSED = 68, 63
CPU, NAN = torch.device("cpu"), float("nan")
KINDS: list[tuple[Compressor, str]] = [
    (RandomK(0.25), "direct"),
    (TopK(0.2), "direct"),
    (TopK(0.2), "two-way"),
    (Sign(), "coordinator"),
    (LowRank(1), "direct"),
]
by_kind = pytest.mark.parametrize(("compressor", "exchange"), KINDS, ids=[f"{c} {e}" for c, e in KINDS])


@dataclass(frozen=True)
class Vector(Update):
    """An update that is a vector, float64[d]."""

    u: Tensor

    def add(self, base: Shaped, out: Shaped) -> None:
        torch.add(base.flat, self.u, out=out.flat)


def engine(compressor: Compressor, exchange: str) -> ErrorFeedback:
    named = [(name, torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()]
    of, channel = Slice(places(named, 6), CPU), Communicator(resolve(None), Ledger())
    found = ErrorFeedback(ErrorMemory(of, spare=True), channel, Guard("none"), Contraction(0), seed=3)
    found.use(compressor, exchange)
    return found


LIMIT = torch.finfo(torch.float64).max / 64  # of the sum of a vector's magnitudes


@pytest.mark.parametrize(
    ("w", "b", "name"), [(0.4, 0.4, None), (0.6, 0.6, "together"), (0.1, 2.0, "b"), (2.0, 2.0, "w"), (0.1, NAN, "b")]
)
def test_the_first_invalid_tensor_is_reported_or_all_together(w: float, b: float, name: str | None) -> None:
    """Each of two tensors may be in range where the vector is not."""
    of = Slice(places([(n, torch.zeros(shape, dtype=torch.float64)) for n, shape in SHAPES.items()], 6), CPU)
    v = torch.zeros(D, dtype=torch.float64)
    v[0], v[-1] = w * LIMIT, b * LIMIT
    invalid, report = Guard("extra", unnamed="together").validate(v, Vector(v), of)
    assert bool(invalid) == bool(report) == (name is not None)
    assert report == (Report() if name is None else Report("vector", name))
    assert bool(v.any()) == (name is None)


def update(rank: int, step: int) -> Vector:
    rng = torch.Generator().manual_seed(100 * rank + step)
    return Vector(torch.randn(D, dtype=torch.float64, generator=rng))


def decoded(g: Averaged) -> Tensor:
    """The mean that all apply, float64[d]."""
    mean = torch.zeros(D, dtype=torch.float64)
    for term in g.mean:
        term.add_to(mean[:COMPRESSED], 1.0)
    mean[COMPRESSED:] = g.dense
    return mean


def take(feedback: ErrorFeedback, rank: int, step: int) -> Tensor:
    with feedback.round(step) as r:
        r.correct(update(rank, step))
        mean = decoded(r.exchange())
        r.absorb()
    return mean


@by_kind
def test_a_round_conserves(compressor: Compressor, exchange: str) -> None:
    """mean_i e_{t+1} = mean_i (e_t + u_t) - mean: nothing is lost, and nothing is applied twice."""

    def run(rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        feedback, found = engine(compressor, exchange), []
        for step in range(6):
            mean = take(feedback, rank, step)
            found.append((feedback.memory.vector.clone(), update(rank, step).u, mean))
        return found

    results = simulate(run, 3)
    pending = torch.zeros(D, dtype=torch.float64)
    for step in range(6):
        e, u, means = ([result[step][i] for result in results] for i in range(3))
        assert all(torch.equal(means[0], mean) for mean in means)
        before, pending = pending, torch.stack(e).mean(0)
        # A few hundred additions of numbers below 100.
        assert torch.allclose(pending, before + torch.stack(u).mean(0) - means[0], rtol=0, atol=1e-12)
        assert float(pending[COMPRESSED:].abs().max()) == 0


@by_kind
@pytest.mark.parametrize("where", ["exchange", "absorb", "roll_back"])
def test_a_rejected_round_leaves_no_trace(compressor: Compressor, exchange: str, where: str) -> None:
    def run(rank: int, broken: bool) -> list[Tensor]:
        feedback, found = engine(compressor, exchange), []
        for step in range(6):
            if broken and step in (0, 3):
                breaks(feedback, rank, step)
            found += [take(feedback, rank, step), feedback.memory.vector.clone()]
        return found

    def breaks(feedback: ErrorFeedback, rank: int, step: int) -> None:
        if where == "roll_back":  # as a hook does, which reads the verdict later
            r = feedback.round(step)
            r.correct(update(rank, step + 50))
            r.exchange()
            r.absorb()
            r.close(apply=False)
            return
        with pytest.raises(RuntimeError, match="lost"):
            loses(feedback, rank, step)

    def loses(feedback: ErrorFeedback, rank: int, step: int) -> None:
        with feedback.round(step) as r:
            r.correct(update(rank, step + 50))
            r.exchange()
            if where == "absorb":
                r.absorb()
            raise RuntimeError("connection lost")

    plain = simulate(lambda rank: run(rank, False), 3)
    again = simulate(lambda rank: run(rank, True), 3)
    for a, b in zip(plain, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_extras_travel_in_the_one_collective() -> None:
    def run(rank: int) -> tuple[list[Tensor], int]:
        feedback = engine(RandomK(0.25), "direct")
        group, calls = feedback.channel.group, []
        reduce = group.all_reduce
        group.all_reduce = lambda tensor: (calls.append(1), reduce(tensor))[1]  # type: ignore
        with feedback.round(0) as r:
            v = r.correct(update(rank, 0))
            r.exchange([v[:0], v.new_tensor([rank, 10.0]), v.new_tensor([1.0])])
        return r.extras, len(calls)

    for extras, calls in simulate(run, 3):
        assert [extra.tolist() for extra in extras] == [[], [1.0, 10.0], [1.0]]
        assert calls == 1


def test_the_contraction_is_of_what_a_worker_sends() -> None:
    """Not of its own chunk, where its memory has the residual of the mean."""

    def run(rank: int) -> tuple[float, float]:
        feedback, n = engine(Sign(), "two-way"), engine(Sign(), "two-way").slice.compressed_d
        feedback.contraction = Contraction(1)
        for step in range(2):
            v = feedback.memory.vector + update(rank, step).u
            take(feedback, rank, step)
        half, rest = v[n // 2 : n] if rank == 0 else v[: n // 2], v[n:].square().sum()
        lost = half.square().sum() - len(half) * half.abs().mean() ** 2
        assert feedback.contraction.whole is not None
        return feedback.contraction.whole, 1 - float(lost / (half.square().sum() + rest))

    for found, expected in simulate(run, 2):
        assert found == pytest.approx(expected, rel=1e-12)


def test_an_optimizer_goes_on_after_an_exchange_that_raised() -> None:
    """As if it had not been tried."""

    def run(broken: bool) -> tuple[Tensor, Tensor]:
        p = torch.nn.Parameter(torch.zeros(8, 8))
        opt = CompressedSGD([p], 0.1, Compression(TopK(0.1), exchange="two-way", back=RandomK(0.3), dense_below=0))
        average = opt.choice.aggregator.average

        def lost(*arguments: object, **options: object) -> None:
            average(*arguments, **options)  # type: ignore[arg-type]
            raise RuntimeError("connection lost")

        for step in range(5):
            p.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
            if broken and step == 3:
                opt.choice.aggregator.average = lost  # type: ignore
                with pytest.raises(RuntimeError, match="connection lost"):
                    opt.step()
                opt.choice.aggregator.average = average  # type: ignore[method-assign]
            opt.step()
        return p.detach().clone(), opt.error()

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)
