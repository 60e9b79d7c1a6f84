"""TopK by chunks against sorts of each chunk, bit by bit in plain Python; what it keeps, and what it costs."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from long_vectors import long_vectors
from torch import Tensor
from torch_loops import both, two_threads

from packsaddle import QSGD, CompressedSGD, Compression, Compressor, TopK, simulate
from packsaddle.compressors import wire
from packsaddle.compressors.values import FORMATS, value_retention


def chosen(v: Tensor, ratio: float, chunk: int) -> list[int]:
    """The k largest of each chunk by a stable sort of a list."""
    values, found = v.double().abs().tolist(), []
    for start in range(0, len(values), chunk):
        places = range(start, min(start + chunk, len(values)))
        order = sorted(places, key=lambda i: -math.inf if math.isnan(values[i]) else -values[i])
        found += sorted(order[: kept(ratio, len(order))])
    return found


def rice_bits(index: list[int], ratio: float, d: int, chunk: int) -> str:
    """The code of `Chunks.encode` in a string of bits, with the parameter that makes the longest code shortest."""
    n = min(d, chunk)
    others = n // kept(ratio, n) - 1 if n else 0
    b = int(math.log2(others)) if others else 0
    longest = longest_quotients(ratio, d, chunk, b)
    unary, remainders, last = "", "", -1
    for before, i in pairwise([-chunk, *index]):
        last = i // chunk * chunk - 1 if i // chunk != before // chunk else before
        gap = i - last - 1
        unary += "0" * (gap >> b) + "1"
        remainders += format(gap & ((1 << b) - 1), f"0{b}b") if b else ""
    unary += "0" * (longest - len(unary))
    return unary + "0" * (-len(unary) % 8) + remainders + "0" * (-len(remainders) % 8)


def kept(ratio: float, n: int) -> int:
    return min(n, max(1, round(ratio * n)))


def longest_quotients(ratio: float, d: int, chunk: int, b: int) -> int:
    """Bits in unary of all gaps, if each chunk's gaps add up to as much as they can, in multiples of 2^b."""
    sizes = [min(chunk, d - start) for start in range(0, d, chunk)]
    return sum(kept(ratio, n) + (n - kept(ratio, n) >> b) for n in sizes)


@given(
    st.integers(0, 400),
    st.sampled_from([0.001, 0.02, 0.1, 0.3, 0.6, 1.0]),
    st.sampled_from([1, 2, 7, 64, 100, 1000]),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_against_sorts_and_strings_of_bits(d: int, ratio: float, chunk: int, seed: int, dtype: torch.dtype) -> None:
    """Few distinct values, so that there are ties, at scales that differ from chunk to chunk."""
    rng = torch.Generator().manual_seed(seed)
    v = ((torch.randn(d, generator=rng) * 2).round() * 10.0 ** -(torch.arange(d) // 50)).to(dtype)
    c, expected = TopK(ratio, chunk=chunk), chosen(v, ratio, chunk)
    assert c.count(d) == len(expected)
    for message in both(lambda: c.encode(v, seed=0, step=0)):
        assert message.context.tolist() == expected
        coded, bits = message.parts["indices"], rice_bits(expected, ratio, d, chunk)
        if len(expected) == d:
            assert len(coded) == 0
        else:
            assert "".join(format(byte, "08b") for byte in coded.tolist()) == bits
        for index in both(lambda m=message: c.support_of(c.receive(m.parts, d, seed=0, step=0), d)):  # type: ignore[misc]
            assert index.tolist() == expected
    sent = torch.zeros_like(v)
    sent[expected] = v[expected]
    assert torch.equal(c(v), sent)


D = 100_007  # whole chunks and a rest


@pytest.mark.parametrize("name", long_vectors(D))
@pytest.mark.parametrize("which", [0, 1])
def test_long_vectors(name: str, which: int) -> None:
    """Compiled loops and torch agree with sorts in all bits, in both precisions; each vector in two settings."""
    settings = [(1 / 64, 4096), (0.3, 1000), (1 / 32, 4096), (0.001, 50_000)]
    ratio, chunk = settings[2 * which + list(long_vectors(D)).index(name) % 2]
    v = long_vectors(D)[name]
    c, expected = TopK(ratio, chunk=chunk), chosen(v, ratio, chunk)
    for w in (v, v.double()):
        compiled, plain = both(lambda w=w: c.encode(w, seed=0, step=0))  # type: ignore[misc]
        assert compiled.context.tolist() == plain.context.tolist() == expected
        assert torch.equal(compiled.parts["indices"], plain.parts["indices"])
        decoded = both(lambda m=compiled: c.support_of(c.receive(m.parts, D, seed=0, step=0), D))  # type: ignore[misc]
        assert all(torch.equal(index, compiled.context) for index in decoded)


def test_threads_choose_the_same() -> None:
    v = torch.randn(1 << 20, generator=torch.Generator().manual_seed(3))
    c = TopK(1 / 64, chunk=4000)
    alone = c.encode(v, seed=0, step=0)
    with two_threads():
        together = c.encode(v, seed=0, step=0)
    assert torch.equal(alone.context, together.context)
    assert torch.equal(alone.parts["indices"], together.parts["indices"])


@pytest.mark.parametrize(
    ("c", "least", "most"),
    [
        (TopK(1 / 64, chunk=4096, values="int2"), 0.0, 10.1),
        (TopK(1 / 64, chunk=4096, values="int4"), 0.0, 12.1),
        (TopK(1 / 32, chunk=4096, values="int2"), 0.0, 9.1),
        (QSGD(), 1.0, 1.15),  # 1.06 bits a level and 1/16 for norms
    ],
    ids=repr,
)
def test_bits_of_a_coordinate_that_is_sent(c: Compressor, least: float, most: float) -> None:
    """All that travels of a Gaussian vector, as the ledger of two workers counts it, with the 8 bytes that announce
    each part's size."""
    d = 1 << 20

    def worker(rank: int) -> int:
        p = torch.nn.Parameter(torch.zeros(1024, 1024))
        opt = CompressedSGD([p], 0.1, Compression(c, dense_below=0), seed=0)
        p.grad = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(rank))
        opt.step()
        return opt.ledger.total.sent - opt.ledger.by_purpose["start"].sent

    for sent in simulate(worker, 2):
        assert least <= 8 * sent / (c.count(d) if isinstance(c, TopK) else d) <= most


def test_no_support_costs_much_more() -> None:
    """Gaps of a chunk add up to at most n - k, so their quotients by 2^b to at most (n - k) / 2^b, whatever they are:
    all messages have one size."""
    for place in (slice(0, 64), slice(4032, 4096), slice(0, 4096, 64), slice(63, 4096, 64)):
        v = torch.zeros(40, 4096)
        v[:, place] = 1.0
        c = TopK(1 / 64, chunk=4096)
        assert 8 * len(c.encode(v.view(-1), seed=0, step=0).parts["indices"]) == 40 * (64 * 6 + 4032 // 32)


def test_mu_is_the_least_share() -> None:
    assert TopK(1 / 64, chunk=4096).mu(40_960) == 1 / 64
    assert TopK(1 / 64, chunk=4096).mu(40_970) == 1 / 64  # one of the last ten
    assert TopK(1 / 64, chunk=4096).mu(41_050) == 1 / 90  # one of the last ninety
    assert TopK(0.3, chunk=10).mu(14) == 1 / 4
    assert TopK(0.3, chunk=10).mu(0) == 1.0
    for how in FORMATS:
        assert TopK(0.3, chunk=8, values=how).mu(50) == TopK(0.3, chunk=8).mu(50) * value_retention(how)
    flat = torch.ones(14)  # where nothing is larger, no more is kept
    flat[:10] = 0
    assert float(TopK(0.3, chunk=10)(flat).square().sum()) == 1.0


def test_chunks_do_not_know_of_each_other() -> None:
    """Unlike TopK of all, which gives a layer of small coordinates nothing."""
    v = torch.cat([torch.randn(4096, generator=torch.Generator().manual_seed(i)) * s for i, s in enumerate((1, 1e-6))])
    assert [int(part.count_nonzero()) for part in TopK(1 / 64)(v).split(4096)] == [128, 0]
    assert [int(part.count_nonzero()) for part in TopK(1 / 64, chunk=4096)(v).split(4096)] == [64, 64]


@given(st.integers(1, 9), st.integers(0, 60), st.integers(0, 12), st.integers(0, 2**31))
def test_gaps_that_begin_anew_round_trip(kept: int, k: int, b: int, seed: int) -> None:
    size = 50
    rng = torch.Generator().manual_seed(seed)
    rows = [torch.randperm(size, generator=rng)[:kept].sort().values + i * size for i in range(-(-k // kept))]
    index = torch.cat(rows)[:k] if rows else torch.zeros(0, dtype=torch.int64)
    unary = k + -(-k // kept) * (size - kept >> b)
    packed, plain = both(lambda: wire.pack_gaps(index, kept, size, b, unary))
    assert torch.equal(packed, plain)
    stop = -(-k // kept) * size
    for found in both(lambda: wire.unpack_gaps(packed, k, kept, size, b, stop)):
        assert torch.equal(found, index)
