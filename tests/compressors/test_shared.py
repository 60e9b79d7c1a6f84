"""SharedTopK against its definition, closed forms of what it keeps, and real workers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from exchanges import exchanged
from torch import Tensor

from packsaddle import CompressedSGD, Compression, SharedTopK, simulate
from packsaddle.numerics.seeds import Stream, add_gaussians, keys


def naive(c: SharedTopK, v: Tensor, seed: int, step: int) -> set[int]:
    """The kept coordinates, with every matrix written out and every block by itself."""
    d = len(v)
    b, (blocks, kept, r) = c.block(d), c.grid(d)
    numbers = torch.zeros(blocks * r * b)
    add_gaussians(numbers, 1.0, keys(seed, step, Stream.PROJECTION))
    energies = []
    for j in range(blocks):
        block = np.zeros(b)
        block[: len(v[j * b : (j + 1) * b])] = v[j * b : (j + 1) * b].double().numpy()
        g = numbers[j * r * b : (j + 1) * r * b].view(r, b).double().numpy()
        energies.append(float(((g @ block) ** 2).sum()))
    chosen = np.argsort(energies)[blocks - kept :]
    return {i for j in chosen for i in range(j * b, min(d, (j + 1) * b))}


@pytest.mark.parametrize(
    ("d", "c"),
    [
        (5000, SharedTopK(0.05, half=False)),
        (5003, SharedTopK(0.05, half=False)),
        (4000, SharedTopK(k=100, block_size=7, half=False)),
        (999, SharedTopK(k=100, block_size=33, projections=5, half=False)),
        (300_000, SharedTopK(0.1, half=False)),  # several slabs
    ],
    ids=repr,
)
def test_the_support_is_that_of_the_definition(d: int, c: SharedTopK) -> None:
    v = torch.randn(d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    message = c.encode(v, seed=3, step=4)
    support = c.support_of(message, d)
    assert set(support.tolist()) == naive(c, v, 3, 4)
    expected = torch.zeros_like(v)
    expected[support] = v[support]
    assert torch.equal(c(v, seed=3, step=4), expected)
    assert message.nbytes == c.message_bytes(d, 8)


def test_projections_do_not_depend_on_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    from packsaddle.compressors import shared
    from packsaddle.compressors.shared import project_blocks

    v, key = torch.randn(1000, generator=torch.Generator().manual_seed(0)), keys(1, 2, Stream.PROJECTION)
    whole = project_blocks(v, 7, 3, key)
    monkeypatch.setattr(shared, "_SLAB", 50)
    assert torch.allclose(project_blocks(v, 7, 3, key), whole, rtol=1e-5, atol=1e-5)
    assert len(whole) == 3 * 143


@pytest.mark.parametrize("shape", ["spread, spike", "spike, spread", "spread, short"])
@pytest.mark.parametrize("half", [True, False])
def test_two_blocks_are_kept_as_often_as_their_energies_say(shape: str, half: bool) -> None:
    """With r = 2 the estimates are e_j times independent exponentials: P(the first is kept) = e_1 / (e_1 + e_2).

    Whatever the blocks look like, and however short the last is; with random signs a spike's energy would be known
    exactly. A third block is so large that it is always one of the two that are kept, and a fourth is zero. 600
    draws; five standard deviations, and 2^-8 for what bfloat16 makes equal.
    """
    b, ratio, draws = 60, 2.0, 600
    rng = torch.Generator().manual_seed(0)
    pair = [torch.randn(7 if how == "short" else b, generator=rng) for how in shape.split(", ")]
    for block, how in zip(pair, shape.split(", "), strict=True):
        if how == "spike":
            block[:], block[5] = 0, 1
    first, second = (x / x.norm() * e**0.5 for x, e in zip(pair, (ratio, 1.0), strict=True))
    v = torch.cat([torch.full((b,), 1e4), first, torch.zeros(b), second])
    c = SharedTopK(k=90, block_size=b, half=half)
    assert c.grid(len(v)) == (4, 2, 2)
    cells = [c.encode(v, seed=s, step=0).context.cells.index.tolist() for s in range(draws)]
    assert all(kept in ([0, 1], [0, 3]) for kept in cells)
    p = ratio / (ratio + 1)
    assert abs(cells.count([0, 1]) / draws - p) <= 5 * (p * (1 - p) / draws) ** 0.5 + 2**-8


def test_shapes_by_default() -> None:
    """Whole blocks make k coordinates but for rounding, mu is at least k/d, and projections cost a quarter."""
    for d in (1, 2, 37, 500, 4001, 20_011, 10**6, 10**9):
        for ratio in (0.001, 0.003, 0.01, 0.05, 0.3, 0.7, 1.0):
            c = SharedTopK(ratio)
            k, b, (blocks, kept, r) = c.count(d), c.block(d), c.grid(d)
            assert (blocks - 1) * b < d <= blocks * b
            assert k / d <= c.mu(d) == kept / blocks <= 1
            for itemsize in (2, 4, 8):
                assert c.message_bytes(d, itemsize) < (d + b) * itemsize
            if r:  # fewer coordinates never cost more, but for what whole blocks round
                assert c.message_bytes(d) <= SharedTopK(min(1.0, 2 * ratio)).message_bytes(d) * 1.05 + 100
                assert c.message_bytes(d) >= 4 * 1.9 * d**0.5
            if r and k > 50 and k * k > 40 * d:
                projected, values = (part.nbytes(4) for part in c.expected_parts(d).values())
                assert values <= 4 * k * 1.03
                assert 0.2 <= projected / values <= 0.3


D, WORKERS = 3001, 3


def exchange(c: SharedTopK) -> dict[str, Any]:
    vs = [torch.randn(D, generator=torch.Generator().manual_seed(i)) for i in range(WORKERS)]
    found = exchanged(c, vs)
    del found["protocol"]  # which does not travel between processes
    return found


@pytest.mark.parametrize("half", [True, False])
def test_real_workers_compress_their_mean(gloo: Callable[..., list[Any]], half: bool) -> None:
    """The mean of the messages is C of the mean, on one support; bytes are counted as predicted, no index among them.

    In bfloat16 the order of a sum may exchange blocks whose estimates are within 1%: at least 8 of 10 are the same.
    """
    c = SharedTopK(k=300, block_size=30, half=half)
    results = gloo(exchange, WORKERS, c)
    mean = torch.stack([r["v"] for r in results]).double().mean(0)
    alone = c(mean.float(), seed=7, step=0)
    for r in results:
        assert torch.equal(r["mean"], results[0]["mean"])
        support = r["mean"] != 0
        assert torch.equal(support, r["own"] != 0)
        assert torch.equal(r["own"][support], r["v"][support])
        assert torch.allclose(r["mean"][support].double(), mean[support], rtol=1e-5, atol=1e-6)
        same = int((support & (alone != 0)).sum())
        assert same >= 240 if half else same == int(support.sum()) >= 271  # the last block has one coordinate
        assert r["dense"].tolist() == [1.0, 1.0]
        assert r["purposes"] == ["dense", "sketch", "values"]
        assert r["bytes"] == r["predicted"]
        assert r["bytes"].payload == c.message_bytes(D) + 8 == 101 * 2 * (2 if half else 4) + 11 * 30 * 4 + 8


def test_nothing_is_projected_where_all_blocks_are_kept() -> None:
    for r in simulate(lambda rank: exchange(SharedTopK(0.9)), WORKERS):
        assert r["purposes"] == ["dense", "values"]
        assert torch.equal(r["own"], r["v"])
        assert r["bytes"] == r["predicted"]


def test_the_monitor_measures_what_is_kept() -> None:
    """Two of twenty blocks have all the energy but a ten-thousandth, and are found: 1 - 1e-4, at every step."""

    p = torch.nn.Parameter(torch.zeros(40, 50))
    compressor = SharedTopK(0.1, block_size=100, projections=16)
    opt = CompressedSGD([p], 1.0, Compression(compressor, dense_below=0, monitor_every=1))
    g = torch.full((20, 100), (1e-4 / (18 * 100)) ** 0.5)
    g[[4, 11]] = ((1 - 1e-4) / 200) ** 0.5
    for _ in range(3):
        p.grad = g.view_as(p).clone()
        opt._memory.reset()
        opt.step()
        assert opt.monitor.whole == pytest.approx(1 - 1e-4, abs=1e-6)
