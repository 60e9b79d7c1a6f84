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
    # The size depends on d and k alone, and is never more than that of a bitmap by over a byte.
    assert len(coded) == wire.index_bytes(d, len(index)) <= math.ceil(d / 8) + 1


@pytest.mark.parametrize(
    "index", [[0], [999_999], [0, 999_999], list(range(500)), list(range(0, 1_000_000, 1000))], ids=len
)
def test_extreme_sets(index: list[int]) -> None:
    tensor = torch.tensor(index)
    assert torch.equal(wire.decode_indices(wire.encode_indices(tensor, 1_000_000), len(index), 1_000_000), tensor)


def entropy(d: int, k: int) -> float:
    """log2 C(d, k)."""
    return (math.lgamma(d + 1) - math.lgamma(k + 1) - math.lgamma(d - k + 1)) / math.log(2)


@pytest.mark.parametrize("d", [2, 3, 10, 100, 1000, 10**4, 10**5, 10**6, 10**9])
def test_indices_take_few_bits_more_than_their_entropy(d: int) -> None:
    """At most 0.57 bits per index, and log2(d / k) + 2 in all, as docs/compressors.md says; two bytes are for what is
    rounded up to whole bytes."""
    chosen = {max(1, round(d ** (1 - exponent) / 2)) for exponent in torch.linspace(0, 1, 2000).tolist()}
    for k in (k for k in chosen if k <= d // 2):
        bits = 8 * wire.index_bytes(d, k) - 16
        assert bits <= entropy(d, k) + 0.57 * k + math.log2(8 * k)
        assert bits <= (math.log2(d / k) + 2) * k


def test_no_smaller_parameter_or_larger_one_would_be_shorter() -> None:
    for n in range(2, 200):
        for k in range(1, n):
            b = wire.gap_parameter(n, k)
            bits = [c * k + wire.gap_bits(n, k, c) for c in range(10)]
            assert bits[b] == min(bits)
