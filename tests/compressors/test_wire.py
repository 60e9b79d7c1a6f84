"""Bit packing and index codes decode exactly, and index sets cost close to their entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_loops import both

from packsaddle.compressors import wire


@given(st.integers(1, 56), st.integers(0, 200), st.integers(0, 2**32))
def test_numbers_round_trip(width: int, n: int, seed: int) -> None:
    numbers = torch.randint(2**width, (n,), generator=torch.Generator().manual_seed(seed))
    packed, plain = both(lambda: wire.pack(numbers, width))
    assert torch.equal(packed, plain)
    assert (packed.dtype, len(packed)) == (torch.uint8, math.ceil(n * width / 8))
    assert all(torch.equal(found, numbers) for found in both(lambda: wire.unpack(packed, width, n)))


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 8, 11, 13])
def test_long_vectors_go_through_in_slabs(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = torch.randint(2**width, (1003,), generator=torch.Generator().manual_seed(0))
    whole = wire.pack(numbers, width)
    monkeypatch.setattr(wire, "_SLAB", 64)
    assert torch.equal(wire.pack(numbers, width), whole)
    assert torch.equal(wire.unpack(whole, width, 1003), numbers)


def test_bits_are_laid_out_most_significant_first() -> None:
    bits = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1], dtype=torch.bool)
    assert wire.pack_bits(bits).tolist() == [0b10000011, 0b10000000]
    assert wire.pack(torch.tensor([5, 2]), 3).tolist() == [0b10101000]
    assert wire.pack(torch.tensor([7]), 0).tolist() == []


@given(st.integers(1, 3000), st.data())
def test_index_sets_round_trip(d: int, data: st.DataObject) -> None:
    chosen = data.draw(st.sets(st.integers(0, d - 1)))
    index = torch.tensor(sorted(chosen), dtype=torch.int64)
    coded = wire.encode_indices(index, d)
    assert torch.equal(wire.decode_indices(coded, len(index), d), index)
    # Never worse than a bitmap or fixed width, and the byte that says which.
    assert len(coded) <= 1 + min(math.ceil(d / 8), math.ceil(len(index) * max(1, (d - 1).bit_length()) / 8))


@pytest.mark.parametrize(
    "index", [[0], [999_999], [0, 999_999], list(range(500)), list(range(0, 1_000_000, 1000))], ids=len
)
def test_extreme_sets(index: list[int]) -> None:
    tensor = torch.tensor(index)
    assert torch.equal(wire.decode_indices(wire.encode_indices(tensor, 1_000_000), len(index), 1_000_000), tensor)


def entropy(d: int, k: int) -> float:
    """log2 C(d, k)."""
    return (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)


def stated(d: int, k: int) -> float:
    """The largest excess over log2 C(d, k), as a fraction of it; docs/compressors.md has the first and the last."""
    return 0.041 if k <= 0.01 * d else 0.066 if k <= 0.1 * d else 0.075


@pytest.mark.parametrize("ratio", [0.0001, 0.001, 0.0054, 0.01, 0.04, 0.08, 0.1, 0.14, 0.2, 0.257, 0.3, 0.5])
def test_index_bits_are_near_the_entropy(ratio: float) -> None:
    """d = 1,000,000: within what is stated of log2 C(d, k) bits, with 0.3% for the draw, and of the prediction."""
    d = 1_000_000
    k = round(ratio * d)
    index = torch.randperm(d, generator=torch.Generator().manual_seed(k))[:k].sort().values
    bits = 8 * len(wire.encode_indices(index, d))
    slack = 0.003 * entropy(d, k) if k > 1000 else 0.02 * entropy(d, k)
    assert entropy(d, k) <= bits + slack
    assert bits <= (1 + stated(d, k)) * entropy(d, k) + 24 + slack
    assert bits == pytest.approx(wire.index_bits(d, k), rel=0.003 if k > 1000 else 0.02)


@pytest.mark.parametrize("d", [2, 3, 10, 100, 1000, 10**4, 10**5, 10**6, 10**9])
def test_predicted_index_bits_are_within_what_is_stated_at_every_ratio(d: int) -> None:
    """Of the three bytes one is in the prediction; two are for what is rounded up to whole bytes."""
    chosen = {max(1, round(d ** (1 - exponent) / 2)) for exponent in torch.linspace(0, 1, 2000).tolist()}
    excess = {k: wire.index_bits(d, k) / entropy(d, k) - 1 for k in chosen if k <= d // 2}
    assert all(wire.index_bits(d, k) <= (1 + stated(d, k)) * entropy(d, k) + 16 for k in excess)
    if d == 10**9:  # and no less would do
        large = {k: share for k, share in excess.items() if k > 10**5}
        for least, most, bound in ((0.001, 0.01, 0.041), (0.01, 0.1, 0.066), (0.1, 0.5, 0.075)):
            assert bound - 0.004 < max(share for k, share in large.items() if least * d < k <= most * d) <= bound


def test_each_code_is_used() -> None:
    rng = torch.Generator().manual_seed(0)
    used = set()
    for k in (2, 40, 500):
        used.add(int(wire.encode_indices(torch.randperm(1000, generator=rng)[:k].sort().values, 1000)[0]))
    used.add(int(wire.encode_indices(torch.tensor([0, 1, 2, 1000_000]), 2**20)[0]))
    assert used == {0, 1, 2}
