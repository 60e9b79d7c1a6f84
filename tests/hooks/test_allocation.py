"""Shares of a compressor's budget over sections of a gradient: beside choices made with all coordinates at hand."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from ddp_runs import wrapped
from hypothesis import example, given
from hypothesis import strategies as st
from test_ddp import Gloo
from torch import Tensor, nn

from packsaddle import (
    QSGD,
    AdaptiveTopK,
    Compression,
    Compressor,
    Identity,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
    register_ddp_hook,
)
from packsaddle.comm.group import resolve
from packsaddle.compressors.selection import counts_among_largest, shared_out, shares_of_support
from packsaddle.hooks.budget import Allocation

SIZES = [3000, 40, 700, 12_000]
SCALES = [0.1, 20.0, 1.0, 0.01]


def sections(seed: int = 0) -> list[Tensor]:
    """Sections of heavy-tailed coordinates, each of its own size and scale."""
    rng = torch.Generator().manual_seed(seed)
    return [s * torch.randn(n, generator=rng).pow(3) for n, s in zip(SIZES, SCALES, strict=True)]


def of_each(chosen: Tensor) -> list[Tensor]:
    """Cut a vector of all sections into theirs."""
    return list(chosen.split(SIZES))


@pytest.mark.parametrize("k", [64, 500, 5000])
def test_counts_are_those_of_the_largest_of_all(k: int) -> None:
    v = torch.cat(sections())
    chosen = torch.zeros(len(v)).index_fill_(0, v.abs().topk(k).indices, 1.0)
    assert counts_among_largest(sections(), SIZES, k) == [float(part.sum()) for part in of_each(chosen)]


@pytest.mark.parametrize("k", [600, 2000])
def test_counts_from_a_sample_are_near(k: int) -> None:
    v = sections()
    samples = [part[3::7] for part in v]
    exact, found = counts_among_largest(v, SIZES, k), counts_among_largest(samples, SIZES, k)
    for a, b in zip(exact, found, strict=True):
        assert abs(a - b) <= 5 * (7 * max(a, 7)) ** 0.5  # five deviations of a count that is sampled one in seven


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99, 1.0])
def test_shares_are_those_of_the_smallest_support_of_all(share: float) -> None:
    v = torch.cat(sections()).double()
    order = v.abs().argsort(descending=True)
    energy = v[order].square().cumsum(0)
    last = int((energy < share * energy[-1]).sum())
    chosen = torch.zeros_like(v).index_fill_(0, order[: last + 1], 1.0)
    for kept, part, found in zip(of_each(chosen * v), of_each(v), shares_of_support(sections(), share), strict=True):
        expected = float(kept.square().sum() / part.square().sum())
        assert found == pytest.approx(max(expected, 1e-6), rel=1e-4, abs=1e-6)


def test_zero_sections_share_by_size() -> None:
    zeros = [torch.zeros(n) for n in SIZES]
    assert shares_of_support(zeros, 0.3) == [0.3] * 4
    assert sum(c.count(n) for c, n in zip(TopK(0.1).apportion(zeros, SIZES) or [], SIZES, strict=True)) == 1574


@example(parts=[(0.0, 1), (5e-324, 1)], total=1)  # the smallest number there is
@given(
    parts=st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 10_000)), min_size=1, max_size=6),
    total=st.integers(1, 40_000),
)
def test_what_is_shared_out_adds_up_within_bounds(parts: list[tuple[float, int]], total: int) -> None:
    weights, sizes = [w for w, _ in parts], [n for _, n in parts]
    counts = shared_out(weights, sizes, total)
    assert sum(counts) == min(max(total, len(sizes)), sum(sizes))
    assert all(1 <= c <= n for c, n in zip(counts, sizes, strict=True))
    # Between parts that no bound holds, shares are in proportion to weights, but for rounding.
    free = [(c, w) for c, w, n in zip(counts, weights, sizes, strict=True) if 2 < c < n - 1 and w > 1e-3 * sum(weights)]
    for c, w in free:
        assert c * free[0][1] == pytest.approx(free[0][0] * w, abs=1.1 * (w + free[0][1]))


@pytest.mark.parametrize("compressor", [TopK(0.02), TopK(k=300), AdaptiveTopK(0.7)])
def test_a_vector_that_stays_is_chosen_from_as_one(compressor: Compressor) -> None:
    v, allocation = sections(), Allocation(sum(SIZES))
    assert budgets(allocation, compressor) == [None] * 4  # nothing is known yet
    observed(allocation, compressor, v)
    one = compressor(torch.cat(v))
    chosen = torch.cat([(c or Identity())(x) for c, x in zip(budgets(allocation, compressor), v, strict=True)])
    # The section of least scale has none of the largest and sends one all the same, in the place of another; an energy
    # is a share of a sum that rounds otherwise, at most one coordinate of each section.
    assert int(((one != 0) != (chosen != 0)).sum()) <= (4 if isinstance(compressor, AdaptiveTopK) else 2)
    if isinstance(compressor, TopK):
        assert int((chosen != 0).sum()) == int((one != 0).sum())


def observed(allocation: Allocation, compressor: Compressor, v: list[Tensor], *, apply: bool = True) -> None:
    """Let a step go by in which the sections were these."""
    allocation.begin(compressor)
    for i, part in enumerate(v):
        allocation.observe((str(i),), part, compressor)
    allocation.close(apply=apply)


def budgets(allocation: Allocation, compressor: Compressor) -> list[Compressor | None]:
    """Each section's compressor in the next step."""
    allocation.begin(compressor)
    return [allocation.of((str(i),), compressor) for i in range(4)]


def test_a_step_that_was_not_taken_is_not_gone_by() -> None:
    allocation, compressor = Allocation(sum(SIZES)), TopK(0.02)
    observed(allocation, compressor, sections(1))
    observed(allocation, compressor, sections(2), apply=False)
    assert budgets(allocation, compressor) == compressor.apportion(sections(1), SIZES)


def test_what_a_step_goes_by_is_saved() -> None:
    compressor, allocation, loaded = TopK(0.02), Allocation(sum(SIZES)), Allocation(sum(SIZES))
    observed(allocation, compressor, sections())
    saved, there = (a.field(lambda: torch.device("cpu")) for a in (allocation, loaded))
    there.load(saved.get())
    assert budgets(loaded, compressor) == compressor.apportion(sections(), SIZES)


@pytest.mark.parametrize(
    "compressor",
    [RandomK(0.1), TopK(0.1, per_tensor=True), SketchTopK(0.01), SharedTopK(0.01), QSGD(), Sign(), LowRank(1)],
    ids=repr,
)
def test_where_magnitudes_elsewhere_do_not_count_nothing_is_allotted(compressor: Compressor) -> None:
    assert compressor.apportion(sections(), SIZES) is None


class Uneven(nn.Module):
    """Three matrices with Gaussian gradients; the first's, which come with the last bucket, are by far the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(60, 60) for _ in range(3))

    def forward(self, noise: Tensor) -> Tensor:
        return sum(
            (s * (p * g).sum() for p, g, s in zip(self.parts, noise, (30.0, 1.0, 1.0), strict=True)), Tensor([0])
        )


def uneven(scope: str, exchange: str) -> dict[str, Any]:
    """Train on them; return the coordinates that were sent by step, and the norm of the error memory."""
    model = wrapped(Uneven(), 0.005)
    hook = register_ddp_hook(model, Compression(TopK(0.05), exchange=exchange), scope=scope)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(resolve(None).rank)
    sent = [0]
    for _ in range(20):
        model.zero_grad()
        model(torch.randn(3, 60, 60, generator=rng)).backward()
        hook.memory()
        sent.append(hook.ledger.by_purpose["values"].payload // 4)
    error = torch.stack(list(hook.memory().values())).norm()
    return {"sent": [b - a for a, b in pairwise(sent)], "error": float(error), "sections": len(hook._slices)}


@pytest.mark.parametrize("exchange", ["direct", "two-way"])
def test_buckets_choose_as_the_model_does(gloo: Gloo, exchange: str) -> None:
    """With budgets by size the error memory is nearly twice the model scope's."""
    cases = zip(gloo(uneven, 2, "bucket", exchange), gloo(uneven, 2, "model", exchange), strict=True)
    for bucket, model in cases:
        assert (bucket["sections"], model["sections"]) == (3, 1)
        assert bucket["error"] < 1.1 * model["error"]
        if exchange == "direct":  # k of the model, 540, at every step
            assert set(bucket["sent"]) == set(model["sent"]) == {540}
