"""Values in fewer bits: how much of their energy is kept, how many bytes they take, and that all of them come back."""

import pytest
import torch
from torch import Tensor

from packsaddle.compressors.values import (
    FORMATS,
    ValueFormat,
    decode_values,
    encode_values,
    value_bytes,
    value_count,
    value_retention,
)


def vectors() -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [
        torch.randn(1000, generator=rng),
        torch.randn(300, generator=rng) * 1e30,
        torch.randn(300, generator=rng) * 1e-30,
        torch.tensor([3.4e38, -3.4e38, 0.0]),
        torch.tensor([1e-42, -2e-42]),
        torch.cat([torch.ones(1), torch.full((255,), 1 / 254.1)]),  # the worst block for int8
        torch.cat([torch.ones(1), torch.full((255,), 1 / 14.1)]),  # and for int4
        torch.cat([torch.full((1,), 128.0), torch.full((128,), 1.01), torch.zeros(127)]),  # and for int2
        torch.logspace(0, -30, 256),
        torch.randn(7, generator=rng, dtype=torch.float64),
    ]


@pytest.mark.parametrize("how", FORMATS)
def test_rounding_keeps_its_share(how: ValueFormat) -> None:
    """The lost share of energy is below what `value_retention` states; rounding to nearest never exceeds the value."""
    for values in vectors():
        parts = encode_values(values, how)
        decoded = decode_values(parts, how, torch.float64)
        error = (decoded - values.double()).abs()
        assert how == "int2" or bool((error <= values.double().abs() * (1 + 1e-6)).all())
        lost = float(error.square().sum() / values.double().square().sum())
        assert lost <= 1 - value_retention(how) + 1e-6  # 1e-42 has three digits
        assert sum(p.numel() * p.element_size() for p in parts.values()) == value_bytes(
            len(values), how, values.element_size()
        )
    assert decode_values(encode_values(torch.zeros(5), how), how, torch.float32).tolist() == [0.0] * 5


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 255, 256, 257, 1023])
def test_all_values_come_back(how: ValueFormat, k: int) -> None:
    values = torch.randn(k, generator=torch.Generator().manual_seed(k))
    parts = encode_values(values, how)
    assert value_count(parts, how) == k
    decoded = decode_values(parts, how, torch.float32)
    assert decoded.shape == (k,)
    assert bool((decoded.sign() * values.sign() >= 0).all())


def test_two_bits_are_the_means_of_two_levels() -> None:
    """Against a sort: magnitudes above the block's mean stand for their mean, the others for theirs."""
    values = torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    decoded = decode_values(encode_values(values, "int2"), "int2", torch.float64)
    for start in range(0, 600, 256):
        block, found = values[start : start + 256], decoded[start : start + 256]
        mean = float(block.abs().mean())
        for side in (block.abs() > mean, block.abs() <= mean):
            torch.testing.assert_close(found[side], block[side].sign() * block[side].abs().mean())


def test_two_bits_keep_most_of_a_gaussian_tail() -> None:
    """What is said of the coordinates that TopK keeps of Gaussian ones."""
    v = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    tail = v[v.abs().topk(1 << 15).indices.sort().values]
    lost = (
        decode_values(encode_values(tail, "int2"), "int2", torch.float32) - tail
    ).square().sum() / tail.square().sum()
    assert 0.002 < float(lost) < 0.03


def test_no_block_of_two_levels_loses_more() -> None:
    """Random search for blocks that keep less than is stated: a few large, many at or below the mean."""
    rng = torch.Generator().manual_seed(3)
    worst = 1.0
    for _ in range(3000):
        powers = torch.rand(256, generator=rng) * torch.rand(1, generator=rng) * 12
        sparse = torch.rand(256, generator=rng) < torch.rand(1, generator=rng)
        values = torch.exp(powers.double()) * sparse
        if not bool(values.any()):
            continue
        decoded = decode_values(encode_values(values, "int2"), "int2", torch.float64)
        worst = min(worst, 1 - float((decoded - values).square().sum() / values.square().sum()))
    assert value_retention("int2") <= worst < 0.9
