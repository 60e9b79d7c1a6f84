"""Stages against the same passes written out, its contraction, and what follows from the compressor in it."""

from collections.abc import Callable
from itertools import combinations

import pytest
import torch

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    CompressedSGD,
    Compression,
    Compressor,
    Identity,
    LinearSketch,
    LowRank,
    RandomK,
    RatioRamp,
    Sign,
    SketchTopK,
    Stages,
    TopK,
    simulate,
)
from packsaddle.compressors.base import part_count
from packsaddle.compressors.registry import describe, identify
from packsaddle.numerics.seeds import mix

V = torch.randn(600, generator=torch.Generator().manual_seed(0))
INSIDE = [Sign(), QSGD(), LowRank(), TopK(0.1), TopK(0.1, chunk=50, values="int1"), RandomK(0.2, values="int2")]


@pytest.mark.parametrize("inner", INSIDE, ids=repr)
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_passes_written_out(inner: Compressor, passes: int) -> None:
    """Each pass compresses what is left by itself, with a seed of its own; a message is all of theirs."""
    whole = Stages(inner, passes).encode(V, seed=5, step=6)
    rest, parts = V.clone(), {}
    for i in range(passes):
        seed = mix(5, i, i) if i else 5
        for name, part in inner.encode(rest, seed=seed, step=6).parts.items():
            parts[f"{i + 1} {name}"] = part
        rest = rest - inner(rest, seed=seed, step=6)
    assert list(whole.parts) == list(parts)
    assert all(torch.equal(whole.parts[name], part) for name, part in parts.items())
    assert torch.allclose(V - Stages(inner, passes)(V, seed=5, step=6), rest, atol=1e-5)


def test_stages_of_stages_are_as_many_passes() -> None:
    """All of their own randomness: coordinates are drawn as by four passes in a row, none as by another pass."""
    inner, v = RandomK(0.25, block_size=1, values="float32"), torch.randn(2000)
    nested, plain = Stages(Stages(inner, 2), 2), Stages(inner, 4)
    contexts = [cells for pair in nested.encode(v, seed=0, step=0).context for cells in pair]
    drawn = [set(cells.index.tolist()) for cells in contexts]
    assert all(len(a & b) < 0.4 * len(a) for a, b in combinations(drawn, 2))
    kept = [sum(float((c(v, seed=s) - v).square().sum()) for s in range(20)) for c in (nested, plain)]
    assert kept[0] == pytest.approx(kept[1], rel=0.05)
    assert nested.mu(2000) == pytest.approx(plain.mu(2000))


@pytest.mark.parametrize("inner", INSIDE, ids=repr)
def test_contraction_is_a_power(inner: Compressor) -> None:
    """mu as stated; and the loss of each pass is about the product of single passes' on such a vector."""
    for passes in (1, 2, 4):
        c = Stages(inner, passes)
        assert c.mu(600) == pytest.approx(1 - (1 - inner.mu(600)) ** passes)
        lost = [float((V - c(V, seed=s)).square().sum() / V.square().sum()) for s in range(40)]
        assert sum(lost) / len(lost) <= (1 - c.mu(600)) * 1.01
    shares = [float((V - Stages(inner, p)(V)).square().sum()) for p in (1, 2, 4)]
    assert shares[0] > shares[1] > shares[2]


def test_two_signs_are_two_scales() -> None:
    """+-1 and +-3: the first pass says 2, the second 1, and nothing is left."""
    v = torch.tensor([1.0, -3.0, 3.0, -1.0])
    assert Stages(Sign(), 1)(v).tolist() == [2, -2, 2, -2]
    assert Stages(Sign(), 2)(v).tolist() == v.tolist()


def test_passes_are_independent() -> None:
    """The cells of the second pass are not those of the first: together 1 - (1 - 0.2)^2 of the coordinates."""
    c, ones = Stages(RandomK(0.2, block_size=1, values="float32"), 2), torch.ones(600)
    assert c.rates(600) == [(600, pytest.approx(0.36))]
    sent = [int(c(ones, seed=1, step=t).count_nonzero()) for t in range(200)]
    assert sum(sent) / 200 == pytest.approx(0.36 * 600, abs=3)
    assert min(sent) > 180  # at the same cells it would be 120, at disjoint ones 240
    assert len(set(sent)) > 10


def test_what_follows_from_the_compressor() -> None:
    assert (Stages(QSGD()).private, Stages(Sign()).private) == (True, False)
    for inner in INSIDE:
        c = Stages(inner, 3)
        assert c.fixed_size == inner.fixed_size
        assert c.needs_tensors == inner.needs_tensors
        assert not c.linear
        assert not c.lossless
        assert c.aggregation == "all-gather"
        assert c.restrict(100, 150, 600).compressor == inner.restrict(100, 150, 600)
        assert part_count(c, 600) == 3 * part_count(inner, 600)
        if inner.fixed_size:
            assert c.message_bytes(600) == 3 * inner.message_bytes(600) == c.encode(V, seed=0, step=0).nbytes
    shapes = [torch.Size((20, 25)), torch.Size((100,))]
    assert Stages(Sign(per_tensor=True)).for_tensors(shapes).compressor == Sign(per_tensor=True).for_tensors(shapes)
    sections, sizes = [torch.ones(200), torch.full((200,), 0.1)], [200, 200]
    assert Stages(TopK(0.5)).apportion(sections, sizes) == [Stages(TopK(k=199)), Stages(TopK(k=1))]
    assert Stages(Sign()).apportion(sections, sizes) is None
    with pytest.raises(ValueError, match="k of TopK must be at most d = 600"):
        Stages(TopK(k=601))(V)


def test_support_is_the_union() -> None:
    c = Stages(TopK(k=5), 3)
    message = c.encode(V, seed=0, step=0)
    received = c.receive(message.parts, 600, seed=0, step=0)
    expected = V.abs().topk(15).indices.sort().values
    for known in (message, received):
        found = c.support_of(known, 600)
        assert found is not None
        assert torch.equal(found, expected)
    assert Stages(Sign()).support_of(Stages(Sign()).encode(V, seed=0, step=0), 600) is None


def test_bytes_of_a_long_vector_are_predicted_from_a_part() -> None:
    c = Stages(AdaptiveTopK(0.3), 2)
    v = torch.randn(1 << 21, generator=torch.Generator().manual_seed(4))
    assert c.encode(v, seed=0, step=0).nbytes == pytest.approx(c.message_bytes(1 << 21), rel=0.02)


def test_in_words() -> None:
    assert describe(Stages(Sign(), 3)) == "Stages(compressor=Sign(), passes=3)"
    assert describe(Sign(per_tensor=True).for_tensors([torch.Size([3])] * 1000)) == "Sign(per_tensor=True)"
    assert identify(Stages(Sign())) == {
        "kind": "Stages",
        "compressor": {"kind": "Sign", "per_tensor": False},
        "passes": 2,
    }


@pytest.mark.parametrize("inner", [Sign(), QSGD(), LowRank(), SketchTopK(0.1), TopK(0.05)], ids=repr)
@pytest.mark.parametrize("exchange", ["direct", "two-way"])
def test_workers_agree_and_nothing_is_lost(inner: Compressor, exchange: str) -> None:
    """Mean of updates plus mean of errors is the mean of what was to be applied, on workers with unlike gradients."""

    def worker(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        p = torch.nn.Parameter(torch.zeros(30, 20, dtype=torch.float64))
        opt = CompressedSGD([p], 0.5, Compression(Stages(inner, 2), exchange=exchange, dense_below=0), seed=1)
        total = torch.zeros_like(p)
        for step in range(4):
            rng = torch.Generator().manual_seed(100 * rank + step)
            p.grad = torch.randn(30, 20, generator=rng, dtype=torch.float64)
            total += 0.5 * p.grad
            opt.step()
        return p.detach(), 0.5 * opt.error().view(30, 20), total

    results = simulate(worker, 3)
    x = [r[0] for r in results]
    assert all(torch.equal(x[0], other) for other in x)
    errors = torch.stack([r[1] for r in results]).mean(0)
    assert torch.allclose(-x[0] + errors, torch.stack([r[2] for r in results]).mean(0), atol=1e-9)


REFUSALS: dict[str, Callable[[], object]] = {
    "compressor of Stages must not be linear, and RandomK": lambda: Stages(RandomK(0.1)),
    "compressor of Stages must not be linear, and LinearSketch": lambda: Stages(LinearSketch(0.1)),
    "compressor of Stages must leave something, and Identity": lambda: Stages(Identity()),
    "compressor of Stages must be a Compressor, got 'Sign'": lambda: Stages("Sign"),  # type: ignore[arg-type]
    "passes of Stages must be a positive integer, got 0": lambda: Stages(Sign(), 0),
    "passes of Stages must be a positive integer, got True": lambda: Stages(Sign(), True),
    "compressor of RatioRamp must have a ratio": lambda: RatioRamp(Stages(TopK(0.1)), stop=10),
}


@pytest.mark.parametrize(("message", "make"), REFUSALS.items())
def test_refusals(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        make()
