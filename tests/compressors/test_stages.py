"""Stages against the same passes written out, its contraction, and what follows from the compressor in it."""

from itertools import combinations

import pytest
import torch

from packsaddle import (
    QSGD,
    Compressor,
    LowRank,
    RandomK,
    Sign,
    Stages,
    TopK,
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
    assert nested.mu(2000) == pytest.approx(plain.mu(2000))


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
        assert c.mu(600) == pytest.approx(1 - (1 - inner.mu(600)) ** 3)
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


def test_in_words() -> None:
    assert describe(Stages(Sign(), 3)) == "Stages(compressor=Sign(), passes=3)"
    assert describe(Sign(per_tensor=True).for_tensors([torch.Size([3])] * 1000)) == "Sign(per_tensor=True)"
    assert identify(Stages(Sign())) == {
        "kind": "Stages",
        "compressor": {"kind": "Sign", "per_tensor": False},
        "passes": 2,
    }
