"""Bit packing and index codes decode exactly, and index sets cost close to their entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packsaddle.compressors import wire


@given(st.integers(1, 40), st.integers(0, 200), st.integers(0, 2**32))
def test_numbers_round_trip(width: int, n: int, seed: int) -> None:
    numbers = torch.randint(2**width, (n,), generator=torch.Generator().manual_seed(seed))
    packed = wire.pack(numbers, width)
    assert (packed.dtype, len(packed)) == (torch.uint8, math.ceil(n * width / 8))
    assert torch.equal(wire.unpack(packed, width, n), numbers)


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


@pytest.mark.parametrize("ratio", [0.0001, 0.001, 0.01, 0.1])
def test_index_bits_are_near_the_entropy(ratio: float) -> None:
    """d = 1,000,000: within 15% of log2 C(d, k) bits, and within 2% of the prediction."""
    d = 1_000_000
    k = round(ratio * d)
    index = torch.randperm(d, generator=torch.Generator().manual_seed(k))[:k].sort().values
    bits = 8 * len(wire.encode_indices(index, d))
    entropy = (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)
    assert entropy <= bits <= 1.15 * entropy
    assert bits == pytest.approx(wire.index_bits(d, k), rel=0.02)


def test_each_code_is_used() -> None:
    rng = torch.Generator().manual_seed(0)
    used = set()
    for k in (2, 40, 500):
        used.add(int(wire.encode_indices(torch.randperm(1000, generator=rng)[:k].sort().values, 1000)[0]))
    used.add(int(wire.encode_indices(torch.tensor([0, 1, 2, 1000_000]), 2**20)[0]))
    assert used == {0, 1, 2}
