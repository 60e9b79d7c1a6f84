"""SketchTopK against its definition, over planted heavy hitters, and over real workers."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exchanges import exchanged
from torch import Tensor

from packsaddle import SketchTopK, simulate
from packsaddle.numerics.sketches import _median


def naive(c: SketchTopK, v: Tensor, seed: int) -> set[int]:
    """The support by tables: hash and sign of every coordinate written out, a median by sorting, a second look."""
    d, k = len(v), c.count(len(v))
    rows, columns, m = c.shape(d)
    estimates = np.zeros((rows, d))
    for r, drawn in enumerate(c.hashes(d, seed=seed, step=0)):
        counter = [(i % columns + drawn.rotations[i // columns]) % columns for i in range(d)]
        sign = [drawn.signs[i // columns] for i in range(d)]
        table = [0.0] * columns
        for i in range(d):
            table[counter[i]] += sign[i] * float(v[i])
        sent = torch.tensor(table, dtype=torch.float64).to(torch.bfloat16 if c.half else v.dtype).tolist()
        estimates[r] = [sign[i] * sent[counter[i]] for i in range(d)]
    magnitude = np.abs(np.median(estimates, axis=0))
    candidates = np.argsort(-magnitude, kind="stable")[:m]
    return set(candidates[np.argsort(-v.abs().numpy()[candidates], kind="stable")[:k]].tolist())


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("rows", [None, 1, 4, 5])
def test_the_support_is_that_of_the_definition(half: bool, rows: int | None) -> None:
    """Without heavy hitters no two estimates tie by construction, but in bfloat16 the last candidates may."""
    d = 2000
    c = SketchTopK(k=10, rows=rows, columns=150, oversample=5, half=half)
    v = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) ** 3
    message = c.encode(v, seed=3, step=0)
    support = c.support_of(message, d)
    assert len(set(support.tolist()) & naive(c, v, 3)) >= (9 if half else 10)
    expected = torch.zeros_like(v)
    expected[support] = v[support]
    assert torch.equal(c(v, seed=3), expected)
    assert message.nbytes == c.message_bytes(d, 8)
    assert message.nbytes == c.shape(d)[0] * 150 * (2 if half else 8) + 50 * 8


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("magnitude", [1.0, 100.0, 1e4, "mixed"])
def test_defaults_find_planted_heavy_hitters(magnitude: float | str) -> None:
    """95% of 50 in 20,011 in the mean over 80 seeds; at 1 the heavy have the noise's energy."""
    d, k, found = 20_011, 50, 0
    for seed in range(80):
        rng = torch.Generator().manual_seed(seed)
        v, at = torch.randn(d, generator=rng), torch.randperm(d, generator=rng)[:k]
        c = torch.full((k,), magnitude) if isinstance(magnitude, float) else 10 ** (4 * torch.rand(k, generator=rng))
        v[at] += c * float(v.norm()) / math.sqrt(k) * torch.where(torch.rand(k, generator=rng) < 0.5, -1.0, 1.0)
        found += int((SketchTopK(k=k)(v, seed=seed)[at] != 0).sum())
    assert found >= 0.95 * 80 * k


def test_bytes_at_a_thousandth() -> None:
    """At most a tenth of dense at k/d = 0.1%, and never more than dense."""
    for d in (10_000, 1_000_000, 10**9):
        assert SketchTopK(0.001).message_bytes(d) <= 0.1 * 4 * d
    for ratio in (0.001, 0.01, 0.019, 0.02, 0.1, 1.0):
        for itemsize in (2, 4, 8):
            assert SketchTopK(ratio).message_bytes(12_345, itemsize) <= 12_345 * itemsize


def test_rows_are_the_least_that_leave_few_ties() -> None:
    """The bound of the docstring, in exact arithmetic: half of the spare candidates, and not with two rows fewer."""

    def tied(d: int, k: int, rows: int) -> float:
        m = rows // 2
        return d * 8.0**-m / 16

    for d, k in ((20_011, 50), (10**6, 200), (10**7, 1000), (10**6, 1000), (10**9, 10), (192 * 24, 24), (192 * 25, 24)):
        rows, columns, candidates = SketchTopK(k=k).shape(d)
        assert (columns, candidates) == (16 * k, 4 * k)
        assert tied(d, k, rows) <= 1.5 * k * (1 + 1e-9)
        assert rows == 3 or tied(d, k, rows - 2) > 1.5 * k
        m = rows // 2
        assert 2 * math.comb(rows, m + 1) * 32.0 ** -(m + 1) <= 8.0**-m / 16


@pytest.mark.parametrize("n", range(1, 16))
def test_median_without_sorting(n: int) -> None:
    """Against numpy's, with ties and infinities."""
    x = torch.randn(n, 999, generator=torch.Generator().manual_seed(n), dtype=torch.float64).mul(2).round()
    x[0, :9] = float("inf")
    assert _median(list(x)).tolist() == np.median(x.numpy(), axis=0).tolist()


D, WORKERS = 3001, 3


def exchange(c: SketchTopK) -> dict[str, Any]:
    vs = [torch.randn(D, generator=torch.Generator().manual_seed(i)) for i in range(WORKERS)]
    for i, v in enumerate(vs):
        v[::100] += 30 * (-1) ** i  # largest everywhere, and small in the mean
        v[50::100] += 10
    found = exchanged(c, vs)
    del found["protocol"]  # which does not travel between processes
    return found


@pytest.mark.parametrize("half", [True, False])
def test_real_workers_find_one_support(gloo: Callable[..., list[Any]], half: bool) -> None:
    """The 30 coordinates that are large in the mean, with their exact mean; what is large on each worker is not sent.

    A mean in another order differs in the last digit.
    """
    c = SketchTopK(k=30, rows=5, columns=300, oversample=3, half=half)
    results = gloo(exchange, WORKERS, c)
    mean = sum(r["v"].double() for r in results) / WORKERS
    expected = set(torch.topk(mean.abs(), 30).indices.tolist())
    for r in results:
        assert torch.equal(r["mean"], results[0]["mean"])
        support = r["mean"].nonzero().squeeze(1)
        assert len(set(support.tolist()) & expected) >= 29
        assert torch.equal(r["own"][support], r["v"][support])
        assert r["own"].count_nonzero() == 30
        assert torch.allclose(r["mean"][support].double(), mean[support], rtol=1e-5, atol=1e-6)
        assert r["dense"].tolist() == [1.0, 1.0]
        assert r["bytes"] == r["predicted"]
        assert r["bytes"].payload == 1500 * (2 if half else 4) + 90 * 4 + 8


def test_where_no_sketch_pays_the_mean_is_compressed_by_topk() -> None:
    for r in simulate(lambda rank: exchange(SketchTopK(0.1)), WORKERS):
        assert r["purposes"] == ["dense", "values"]
        assert r["mean"].count_nonzero() == 300
        assert r["bytes"] == r["predicted"]
