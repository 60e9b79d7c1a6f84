"""Every compressor has every property on every nasty vector; RandomK's support is uniform; bad arguments are named."""

import properties
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inputs import battery
from scipy.stats import chisquare
from torch import Tensor

from packsaddle import Compressor, Identity, RandomK, TopK

COMPRESSORS: dict[str, Compressor] = {
    "Identity": Identity(),
    "RandomK 1%": RandomK(0.01),
    "RandomK 30%": RandomK(0.3),
    "RandomK in blocks": RandomK(0.3, block_size=4),
    "RandomK k=1": RandomK(k=1),
    "RandomK everything": RandomK(1.0),
    "TopK 1%": TopK(0.01),
    "TopK 30%": TopK(0.3),
    "TopK k=1": TopK(k=1),
    "TopK everything": TopK(1.0),
}
by_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS.keys())
by_vector = pytest.mark.parametrize("v", battery().values(), ids=battery().keys())


@by_compressor
@by_vector
def test_contract(compressor: Compressor, v: Tensor) -> None:
    properties.assert_contracts(compressor, v)
    properties.assert_pure(compressor, v)
    properties.assert_message(compressor, v)
    properties.assert_homogeneous(compressor, v)
    if compressor.linear:
        properties.assert_linear(compressor, v)


def test_topk_is_not_linear() -> None:
    a, b = torch.tensor([2.0, 1.0]), torch.tensor([-2.0, 1.0])
    c = TopK(k=1)
    assert not torch.equal(c(a + b), c(a) + c(b))
    assert not c.linear


@by_vector
def test_topk_against_sorting(v: Tensor) -> None:
    """The kept coordinates are kept exactly, there are k of them, and no dropped one is larger."""
    kept = TopK(0.3).encode(v, seed=0, step=0)
    values, index = kept.payload
    assert torch.equal(values, v[index.long()])
    assert len(set(index.tolist())) == len(index) == TopK(0.3).count(v.numel())
    magnitudes = sorted(v.abs().tolist(), reverse=True)
    assert sorted(values.abs().tolist(), reverse=True) == magnitudes[: len(values)]


@given(st.integers(1, 400), st.floats(0.001, 1.0), st.integers(1, 50), st.integers(0, 2**63 - 1), st.integers(0, 10**9))
def test_randomk_support_has_k_distinct_coordinates(d: int, ratio: float, block: int, seed: int, step: int) -> None:
    c = RandomK(ratio, block_size=block)
    support = c.support(d, seed=seed, step=step).tolist()
    assert len(set(support)) == len(support) == c.count(d) == max(1, round(ratio * d))
    assert all(0 <= i < d for i in support)


@pytest.mark.parametrize(
    ("d", "k", "block"), [(7, 3, 1), (40, 4, 1), (40, 10, 4), (41, 13, 5), (5000, 50, 1), (5000, 96, 32)]
)
def test_randomk_marginals_are_uniform(d: int, k: int, block: int) -> None:
    """Over seeds, every coordinate is kept equally often (chi-square over coordinates, binned if d is large)."""
    c, seeds = RandomK(k=k, block_size=block), 4000
    counts = torch.zeros(d)
    for seed in range(seeds):
        counts[c.support(d, seed=seed, step=5)] += 1
    bins = counts.reshape(-1, max(1, d // 50)).sum(1) if d >= 100 else counts
    # Within one draw inclusion is negatively correlated (k of d) or comes in runs of `block`.
    inflation = block * (1 - k / d)
    assert chisquare((bins / inflation).numpy()).pvalue > 1e-4


def test_randomk_pairs_are_uniform() -> None:
    """Without blocks, pairs of coordinates are kept together equally often, also just above the small-domain limit."""
    d, k, seeds = 4100, 1000, 400
    adjacent = mirrored = 0
    for seed in range(seeds):
        kept = torch.zeros(d, dtype=torch.bool)
        kept[RandomK(k=k).support(d, seed=seed, step=1)] = True
        adjacent += int((kept[1:] & kept[:-1]).sum())
        mirrored += int((kept & kept.flip(0)).sum())
    p = k * (k - 1) / (d * (d - 1))
    for found, pairs in ((adjacent, d - 1), (mirrored, d)):
        expected = p * pairs * seeds
        assert abs(found - expected) < 6 * (expected * 2) ** 0.5


def test_randomk_differs_between_steps_and_seeds() -> None:
    c = RandomK(k=20)
    supports = {tuple(c.support(10_000, seed=s, step=t).tolist()) for s in range(4) for t in range(4)}
    assert len(supports) == 16


@pytest.mark.parametrize("c", [RandomK(0.25), TopK(0.25), RandomK(k=10, block_size=3), Identity()], ids=repr)
def test_mu(c: Compressor) -> None:
    assert c.mu(40) == (1.0 if isinstance(c, Identity) else 0.25)
    assert c.mu(1) == 1.0


@pytest.mark.parametrize("kind", [RandomK, TopK])
def test_bad_arguments_are_named(kind: type[RandomK | TopK]) -> None:
    for ratio in (0.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"ratio of {kind.__name__} must be in \(0, 1\], got {ratio}"):
            kind(ratio)
    with pytest.raises(ValueError, match=r"got 50; for a number of coordinates pass k="):
        kind(50)
    with pytest.raises(ValueError, match="exactly one of ratio and k"):
        kind(0.1, k=3)
    with pytest.raises(ValueError, match="exactly one of ratio and k"):
        kind()
    for k in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"k of {kind.__name__} must be a positive integer, got {k}"):
            kind(k=k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"must be at most d = 3 \(the coordinates\), got 5"):
        kind(k=5)(torch.ones(3))
    with pytest.raises(ValueError, match=r"flat floating-point tensor, got shape \(2, 2\)"):
        kind(0.5)(torch.ones(2, 2))
    with pytest.raises(ValueError, match="flat floating-point tensor"):
        kind(0.5)(torch.ones(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="block_size of RandomK"):
        RandomK(0.1, block_size=0)
