"""Every compressor has every property on every nasty vector; supports, codes and recovery; bad arguments are named."""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from typing import Any

import numpy
import pytest
import torch
from conformance import check_compressor, nasty_vectors
from families import COMPRESSORS
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from torch_loops import torch_only

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    Identity,
    LinearSketch,
    LowRank,
    Message,
    RandomK,
    Rounded,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.compressors import describe

by_vector = pytest.mark.parametrize("v", nasty_vectors().values(), ids=nasty_vectors().keys())
# Those between which the energy that is lost differs; the others are of another scale, dtype or length.
TELLING = ("gaussian", "one spike", "all equal", "ties of both signs", "heavy tail", "wide range")
TELLING += ("negative zero", "two coordinates")
SLOW = (SketchTopK, QSGD)


@pytest.mark.parametrize(
    "compressor",
    [pytest.param(c, marks=[pytest.mark.slow] * isinstance(c, SLOW)) for c in COMPRESSORS],
    ids=repr,
)
def test_conformance(compressor: Compressor) -> None:
    """Expectations are means over 80 seeds, or 30 where a call takes long, or 10 on vectors that tell less of them, or
    over two where every seed gives the same, which is checked."""
    same = isinstance(compressor, Identity | TopK | AdaptiveTopK | Sign)
    seeds = 30 if isinstance(compressor, SLOW) else 80
    telling = {name: v for name, v in nasty_vectors().items() if name in TELLING}
    others = {name: v for name, v in nasty_vectors().items() if name not in TELLING}
    check_compressor(compressor, telling, seeds=2 if same else seeds)
    check_compressor(compressor, others, seeds=2 if same else 10)
    if same:
        v = torch.randn(50, generator=torch.Generator().manual_seed(0))
        assert all(torch.equal(compressor(v, seed=s), compressor(v, seed=0)) for s in range(1, 20))


@dataclass(frozen=True)
class Broken(Compressor):
    """Top-1 with one thing wrong."""

    wrong: str

    @property
    def linear(self) -> bool:
        return self.wrong == "linear"

    def mu(self, d: int) -> float:
        return 0.99 if self.wrong == "mu" else 1 / max(d, 1)

    def encode(self, v: Tensor, *, seed: int, step: int) -> Message:
        index = v.abs().argmax().view(1) if len(v) else torch.empty(0).long()
        values = v[index] if self.wrong != "homogeneous" else v[index].clamp(-1, 1)
        return Message({"values": values, "index": index})

    def add_decoded(self, message: Message, out: Tensor, alpha: float = 1.0) -> None:
        values = message.parts["values"] * (1.0 if self.wrong == "alpha" else alpha)
        out.index_add_(0, message.parts["index"], values)


def test_what_is_broken_is_found() -> None:
    for wrong in ("mu", "alpha", "homogeneous", "linear"):
        with pytest.raises(AssertionError):
            check_compressor(Broken(wrong), seeds=2)
    check_compressor(Broken("nothing"), seeds=2)


@pytest.mark.parametrize(
    "compressor", [QSGD(1), QSGD(), QSGD(127), QSGD(1000, 3), QSGD(1 << 23), QSGD(coded=False)], ids=repr
)
def test_levels_of_the_largest_numbers_are_finite(compressor: QSGD) -> None:
    """Also where a level times a norm, which may be as large, is not."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        v = torch.tensor([1.0, -0.5, 0.0, 2.0**-20] * 20, dtype=dtype)
        scale = torch.finfo(torch.promote_types(dtype, torch.float32)).max / 64 / 256
        scale = min(scale, torch.finfo(dtype).max / 2)
        expected = compressor(v.to(torch.promote_types(dtype, torch.float32)), seed=1).double()
        for context in (contextlib.nullcontext(), torch_only()):
            with context:
                found = compressor(v * scale, seed=1).double() / scale
            assert torch.allclose(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6), dtype


def test_numbers_of_other_libraries() -> None:
    v = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for compressor in (RandomK(0.1), QSGD(), LowRank(), SharedTopK(0.1), SketchTopK(0.1), LinearSketch(0.1)):
        assert torch.equal(compressor(v, seed=numpy.int64(-5), step=numpy.int32(3)), compressor(v, seed=-5, step=3))
    for share in (numpy.float32(0.25), Fraction(1, 4)):
        assert repr(TopK(share)) == repr(TopK(0.25))  # type: ignore[arg-type]
        assert repr(AdaptiveTopK(share)) == repr(AdaptiveTopK(0.25))  # type: ignore[arg-type]
        assert repr(LinearSketch(share)) == repr(LinearSketch(0.25))  # type: ignore[arg-type]


def test_few_of_no_coordinates() -> None:
    for compressor in (TopK(k=5), RandomK(k=5)):
        assert compressor.restrict(0, 0, 10) == compressor
        assert compressor.message_bytes(0) == 0


@by_vector
def test_topk_against_sorting(v: Tensor) -> None:
    """The kept coordinates are kept exactly, there are k of them, and no dropped one is larger."""
    kept = TopK(0.3)(v)
    support = TopK(0.3).encode(v, seed=0, step=0).context
    assert torch.equal(kept[support], v[support])
    assert len(support) == TopK(0.3).count(len(v))
    magnitudes = sorted(v.abs().tolist(), reverse=True)
    assert sorted(v[support].abs().tolist(), reverse=True) == magnitudes[: len(support)]


@by_vector
@pytest.mark.parametrize("share", [0.1, 0.5, 0.999, 1.0])
def test_adaptive_support_is_the_smallest(v: Tensor, share: float) -> None:
    support = AdaptiveTopK(share).encode(v, seed=0, step=0).context
    squares = sorted((v.double() ** 2).tolist(), reverse=True)
    k, total = len(support), math.fsum(squares)
    assert math.fsum(squares[:k]) >= share * total * (1 - 1e-12)
    if share == 1:
        assert k == int(v.count_nonzero())  # also those too small for a sum in double precision
    elif k:
        assert math.fsum(squares[: k - 1]) < share * total


def test_sign_by_tensor() -> None:
    """Two tensors, two scales: (|1| + |3|) / 2 and (|10| + |0| + |20|) / 3, the sign of 0 being +."""
    v = torch.tensor([1.0, -3.0, 10.0, 0.0, -20.0])
    by_tensor = Sign(per_tensor=True).for_tensors([torch.Size((2, 1)), torch.Size((3,))])
    assert by_tensor(v).tolist() == [2.0, -2.0, 10.0, 10.0, -10.0]
    assert Sign().for_tensors([torch.Size((2,)), torch.Size((3,))])(v)[0] == pytest.approx(34 / 5)


def test_bytes_of_quantisers() -> None:
    for d in (1, 8, 1000, 100_003):
        v = torch.randn(d, generator=torch.Generator().manual_seed(d))
        assert Sign().encode(v, seed=0, step=0).nbytes == math.ceil(d / 8) + 4
        levels = QSGD(levels=7, bucket=512, coded=False).encode(v, seed=0, step=0)
        assert levels.nbytes == math.ceil(d * 4 / 8) + 4 * math.ceil(d / 512)
    assert Sign().message_bytes(1_000_000) * 8 / 1_000_000 <= 1.02
    assert [QSGD(levels=s).bits for s in (1, 2, 3, 7, 127)] == [
        math.ceil(math.log2(2 * s + 1)) for s in (1, 2, 3, 7, 127)
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [1, 7, 127, 1000])
def test_qsgd_is_unbiased_with_the_variance_of_its_levels(levels: int, dtype: torch.dtype) -> None:
    """The mean of n draws of a coordinate x u, u = ||v|| / levels, has variance u^2 p (1 - p) / n, p the fraction of x.

    z is in units of that, not of the draws' own deviation: where p is about 1 / n or less all draws may be equal, and
    rounding over a deviation of 0 is a z of any size, the more so in float32. By Bernstein's inequality a mean is off
    by 5 deviations + 5 u / n less often than once in 10^5; six roundings add at most 4 eps x u, and 4 eps x to p.
    """
    n, b = 3000, 512
    v = torch.randn(b, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    c = QSGD(levels, b)
    draws = c(v.repeat(n), seed=1).double().view(n, b) * (1 + c.omega(b))  # a bucket each, drawn independently
    unit, eps = float(v.double().norm()) / levels, torch.finfo(dtype).eps
    x = v.double().abs() / unit
    p, rounding = x % 1, 4 * eps * x
    error, deviation = draws.mean(0) - v.double(), unit * ((p * (1 - p) + rounding) / n).sqrt()
    assert bool((error.abs() <= 5 * deviation + 5 * unit / n + rounding * unit).all())
    z = (error / deviation * v.sign())[n * p * (1 - p) > 10].double()
    assert float(z.square().mean()) == pytest.approx(1, abs=5 * (2 / len(z)) ** 0.5)
    assert abs(float(z.mean())) <= 5 / len(z) ** 0.5


@pytest.mark.parametrize("columns", [8, 20, 33])
def test_linear_sketch_is_unbiased_with_its_variance(columns: int) -> None:
    """S^T S v, before scaling: mean v, and E||S^T S v - v||^2 close to, and not above, omega ||v||^2."""
    c = LinearSketch(columns=columns)
    v = torch.randn(80, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    draws = torch.stack([c(v, seed=s) for s in range(1000)]) * (1 + c.omega(80))
    assert bool(((draws.mean(0) - v).abs() <= 5 * draws.std(0) / 1000**0.5).all())
    relative = (draws - v).square().sum(1) / v.square().sum()
    mean, error = float(relative.mean()), float(relative.std()) / 1000**0.5
    assert mean <= c.omega(80) + 5 * error
    assert mean >= 0.7 * c.omega(80)


def test_sketch_is_the_matrix_it_says() -> None:
    """S from sketches of unit vectors has one +-1 a column, and `add_transposed` is its transpose."""
    from packsaddle.numerics.sketches import RowHash, estimates_at, median_estimates

    d, c = 23, 7
    row = RowHash.draw(d, c, seed=1, step=2)
    s = torch.stack([row.sketch(e) for e in torch.eye(d)], dim=1)
    assert s.abs().sum(0).tolist() == [1.0] * d
    table, back = torch.randn(c, generator=torch.Generator().manual_seed(0)), torch.zeros(d)
    row.add_transposed(table, back)
    assert torch.allclose(back, s.T @ table)
    for rows in (1, 2, 3, 4, 5):
        hashes = [RowHash.draw(d, c, seed=1, step=2, row=r) for r in range(rows)]
        tables = torch.randn(rows, c, generator=torch.Generator().manual_seed(rows))
        each = [torch.zeros(d) for _ in hashes]
        for h, t, out in zip(hashes, tables, each, strict=True):
            h.add_transposed(t, out)
        expected = torch.stack(each).quantile(0.5, dim=0)
        medians = torch.cat(list(median_estimates(hashes, tables, d)))
        assert torch.allclose(medians, expected, atol=1e-6)
        some = torch.arange(0, d, 3)
        assert torch.equal(estimates_at(hashes, tables, some), medians[some])


@pytest.mark.parametrize(("d", "c"), [(23, 7), (500, 3), (64, 64), (10, 30)])
def test_many_small_chunks_are_the_same_sketch(d: int, c: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for many chunks, in blocks, against the way for few."""
    from packsaddle.numerics import sketches

    v = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hashes = [sketches.RowHash.draw(d, c, seed=4, step=5, row=r) for r in range(3)]
    tables = torch.stack([h.sketch(v) for h in hashes])
    back, medians = torch.ones(d, dtype=torch.float64), list(sketches.median_estimates(hashes, tables, d))
    hashes[0].add_transposed(tables[0], back, 0.5)
    monkeypatch.setattr(sketches, "_MANY", 0)
    monkeypatch.setattr(sketches, "_BLOCK", 30)
    other = torch.ones(d, dtype=torch.float64)
    hashes[0].add_transposed(tables[0], other, 0.5)
    assert torch.allclose(torch.stack([h.sketch(v) for h in hashes]), tables, rtol=1e-12)
    assert torch.equal(other, back)
    assert torch.equal(torch.cat(list(sketches.median_estimates(hashes, tables, d))), torch.cat(medians))


@pytest.mark.slow
@pytest.mark.parametrize("position", [0, 6, 19])
def test_a_lone_spike_is_sent_wherever_it_is(position: int) -> None:
    """The worst case for a sketch of one counter: every coordinate ties with it, and is sent at a rate of 1/d.

    600 draws then have 30 hits, and 11 are 3.5 deviations below.
    """
    c, v = SketchTopK(k=1, rows=1, columns=1, oversample=1), torch.eye(20)[position]
    hits = (s for s in range(600) if c(v, seed=s).any())
    assert len(list(islice(hits, 11))) == 11


def test_low_rank_matches_singular_values() -> None:
    """A matrix of rank 2 comes back exactly from 2 columns; of higher rank, no better than its truncated SVD."""
    rng = torch.Generator().manual_seed(0)
    low = torch.randn(20, 2, generator=rng) @ torch.randn(2, 15, generator=rng)
    c = LowRank(2).for_tensors([torch.Size((20, 15))])
    assert torch.allclose(c(low.flatten()), low.flatten(), atol=1e-4)
    full = torch.randn(20, 15, generator=rng)
    lost = float((c(full.flatten()) - full.flatten()).square().sum())
    assert float(torch.linalg.svdvals(full)[2:].square().sum()) <= lost <= float(full.square().sum())
    assert c.message_bytes(300) == 4 * 2 * (20 + 15) == c.encode(full.flatten(), seed=0, step=0).nbytes


@pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
def test_predicted_message_bytes(compressor: Compressor) -> None:
    """Exact for messages of fixed size, in every dtype; within 5% for coded supports of a random vector."""
    v = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    for dtype in (torch.float32, torch.float64, torch.bfloat16) if compressor.fixed_size else (torch.float32,):
        found = compressor.encode(v.to(dtype), seed=1, step=2).nbytes
        predicted = compressor.message_bytes(4000, dtype.itemsize)
        assert found == predicted if compressor.fixed_size else found == pytest.approx(predicted, rel=0.05), dtype


@given(st.integers(1, 400), st.floats(0.001, 1.0), st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_randomk_support_is_k_distinct_coordinates_in_whole_cells(
    d: int, ratio: float, block: int, seed: int, step: int
) -> None:
    c, k = RandomK(ratio, block_size=block), max(1, round(ratio * d))
    b = min(block, k)
    support = c.support(d, seed=seed, step=step).tolist()
    assert len(set(support)) == len(support)
    assert all(0 <= i < d for i in support)
    cells = {i // b for i in support}
    assert sorted(support) == [i for i in range(d) if i // b in cells]
    if block == 1:
        assert len(support) == k
    values = c.message_bytes(d) / 4
    assert len(cells) * b == values
    assert k <= values < k * (1 + b / d) + b


def test_randomk_default_block_size_keeps_at_least_1024_cells() -> None:
    for k in (1, 1000, 2047, 2048, 5000, 65_535, 65_536, 1_000_000, 10_000_000):
        c = RandomK(k=k)
        b, (n, m) = c.block(20_000_000), c.grid(20_000_000)
        assert n * b >= 20_000_000
        assert b in (1, 2, 4, 8, 16, 32, 64, 128)
        assert b == 1 or m >= 1024
        assert b == 128 or k < 2048 * b


@pytest.mark.parametrize(
    ("d", "k", "block"), [(7, 3, 1), (40, 4, 1), (40, 10, 4), (41, 13, 5), (5000, 50, 1), (5000, 96, 32)]
)
def test_randomk_marginals_are_uniform(d: int, k: int, block: int) -> None:
    """Over seeds, every coordinate is kept equally often (chi-square over coordinates, binned if d is large)."""
    c, seeds = RandomK(k=k, block_size=block), 600
    counts = torch.zeros(d)
    for seed in range(seeds):
        counts[c.support(d, seed=seed, step=5)] += 1
    bins = counts.reshape(-1, max(1, d // 50)).sum(1) if d >= 100 else counts
    n, m = c.grid(d)
    # Within one draw inclusion is negatively correlated (m of n) or comes in runs of `block`.
    inflation = block * (1 - m / n)
    assert chisquare((bins / inflation).numpy()).pvalue > 1e-4


def test_mu_in_closed_form() -> None:
    for c in (RandomK(0.25), TopK(0.25), RandomK(k=10, block_size=5)):
        assert (c.mu(40), c.mu(1)) == (0.25, 1.0)
    assert Identity().mu(40) == 1.0
    assert AdaptiveTopK(0.7).mu(40) == 0.7
    assert Sign().mu(40) == 1 / 40
    assert QSGD(levels=4, bucket=16).mu(100) == 1 / (1 + min(16 / 16, 4 / 4))
    assert LinearSketch(columns=10).mu(40) == 10 / 40
    assert LinearSketch(columns=10).mu(43) == 10 / (10 + 40)


@pytest.mark.parametrize("kind", [RandomK, TopK, SketchTopK, SharedTopK])
def test_a_ratio_and_a_number_are_not_mixed_up(kind: Any) -> None:
    name = kind.__name__
    ratios: dict[Any, str] = {
        **dict.fromkeys((0.0, -0.1, math.nan), rf"ratio of {name} must be in \(0, 1\], got "),
        **dict.fromkeys((50, 1.5), r"got [\d.]+; for a number of coordinates pass k=, and "),
        numpy.int64(1): "not an integer, got 1; for a number of coordinates pass k=, and",
        "0.1": rf"ratio of {name} must be a number in \(0, 1\], got '0.1'",
    }
    for ratio, message in ratios.items():
        with pytest.raises(ValueError, match=message):
            kind(ratio)
    for flag in (True, False):
        with pytest.raises(ValueError, match=rf"ratio of {name} must be a number in \(0, 1\], got {flag}"):
            kind(flag)
    for k in (True, False, 0, -1, 2.5):
        with pytest.raises(ValueError, match=f"k of {name} must be an integer of at least 1, got {k}"):
            kind(k=k)
    for both_or_none in ({}, {"ratio": 0.1, "k": 3}):
        with pytest.raises(ValueError, match="exactly one of ratio and k"):
            kind(**both_or_none)
    with pytest.raises(ValueError, match=r"must be at most d = 3 \(the coordinates\), got 5"):
        kind(k=5)(torch.ones(3))
    for wrong in (torch.ones(2, 2), torch.ones(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"flat floating-point tensor"):
            kind(0.5)(wrong)
    assert kind(1.0).mu(10) == kind(numpy.float64(1)).mu(10) == 1


# Numbers of which there must be at least one: rows, levels and so on.
COUNTS: dict[str, Callable[[Any], Compressor]] = {
    "rows of SketchTopK": lambda n: SketchTopK(0.1, rows=n),
    "columns of SketchTopK": lambda n: SketchTopK(0.1, columns=n),
    "oversample of SketchTopK": lambda n: SketchTopK(0.1, oversample=n),
    "block_size of SharedTopK": lambda n: SharedTopK(0.1, block_size=n),
    "projections of SharedTopK": lambda n: SharedTopK(0.1, projections=n),
    "block_size of RandomK": lambda n: RandomK(0.1, block_size=n),
    "columns of LinearSketch": lambda n: LinearSketch(columns=n),
    "levels of QSGD": lambda n: QSGD(levels=n),
    "bucket of QSGD": lambda n: QSGD(bucket=n),
    "matrix_rank of LowRank": LowRank,
}


@pytest.mark.parametrize("name", COUNTS)
def test_a_count_is_a_positive_integer(name: str) -> None:
    for wrong in (0, True, 0.5):
        with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1, got {wrong}"):
            COUNTS[name](wrong)


REFUSALS: dict[str, Callable[[], object]] = {
    "per_tensor of Sign must be True or False, got 1": lambda: Sign(per_tensor=1),  # type: ignore[arg-type]
    "chunk of TopK must be an integer from 1 to 1,073,741,824, got 0": lambda: TopK(0.1, chunk=0),
    "chunk of TopK must be an integer .* got True": lambda: TopK(0.1, chunk=True),
    "chunk of TopK must be an integer .* got 4096.0": lambda: TopK(0.1, chunk=4096.0),  # type: ignore[arg-type]
    "chunk of TopK must be an integer .* got 2147483648": lambda: TopK(0.1, chunk=2**31),
    "chunk of TopK needs a ratio, got k=64": lambda: TopK(k=64, chunk=4096),
    "values of TopK must be one of float32, bfloat16": lambda: TopK(0.1, values="int5"),  # type: ignore[arg-type]
    "values of Rounded must be one of float32, bfloat16.* got None": lambda: Rounded(None),  # type: ignore[arg-type]
    r"share of AdaptiveTopK must be in \(0, 1\], got 0": lambda: AdaptiveTopK(0.0),
    "share of AdaptiveTopK .* not an integer, got 1; .*TopK's k=; for all of it pass 1.0": lambda: AdaptiveTopK(1),
    "rows of SketchTopK must be at most 100, got 1000000000000": lambda: SketchTopK(0.1, rows=10**12),
    "half of SketchTopK must be True or False, got 1": lambda: SketchTopK(0.1, half=1),  # type: ignore[arg-type]
    "half of SharedTopK must be True or False, got None": lambda: SharedTopK(0.1, half=None),  # type: ignore[arg-type]
    r"levels of QSGD must be at most 2\^23, .* got 8388609": lambda: QSGD((1 << 23) + 1),
    "coded of QSGD must be True or False, got 1": lambda: QSGD(coded=1),  # type: ignore[arg-type]
    "LinearSketch takes exactly one of ratio and columns": lambda: LinearSketch(),
    r"ratio of LinearSketch must be in \(0, 1\], got 2": lambda: LinearSketch(2.0),
    "ratio of LinearSketch .* not an integer, got 1; for a number of counters pass columns=": lambda: LinearSketch(1),
}


@pytest.mark.parametrize(("message", "make"), REFUSALS.items())
def test_refusals(message: str, make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_descriptions_omit_the_sizes_of_tensors() -> None:
    assert describe(Sign(per_tensor=True).for_tensors([torch.Size([3])] * 1000)) == "Sign(per_tensor=True)"
