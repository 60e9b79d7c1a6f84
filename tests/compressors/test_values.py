"""Values in fewer bits: how much of their energy is kept, how many bytes they take, and that all of them come back."""

import math

import pytest
import torch
from torch import Tensor

from packsaddle.compressors.values import (
    FORMATS,
    ValueFormat,
    add_values,
    decode_values,
    encode_values,
    value_count,
    value_parts,
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


def rounded(values: Tensor, how: ValueFormat, dtype: torch.dtype) -> Tensor:
    return decode_values(encode_values(values, how), how, dtype, len(values))


@pytest.mark.parametrize("how", FORMATS)
def test_rounding_keeps_its_share(how: ValueFormat) -> None:
    """The lost share of energy is below what `value_retention` states; rounding to nearest never exceeds the value."""
    for values in vectors():
        parts = encode_values(values, how)
        decoded = decode_values(parts, how, torch.float64, len(values))
        error = (decoded - values.double()).abs()
        assert how == "int2" or bool((error <= values.double().abs() * (1 + 1e-6)).all())
        lost = float(error.square().sum() / values.double().square().sum())
        assert lost <= 1 - value_retention(how) + 1e-6  # 1e-42 has three digits
        predicted = sum(p.nbytes(values.element_size()) for p in value_parts(len(values), how).values())
        assert sum(p.numel() * p.element_size() for p in parts.values()) == predicted
    assert rounded(torch.zeros(5), how, torch.float32).tolist() == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_levels_are_the_means_of_their_magnitudes(dtype: torch.dtype, scale: float) -> None:
    """Against lists: each is within 2^-9, which is what 16 bits hold of a level."""
    values = (torch.randn(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale).to(dtype)
    for block, found in zip(values.split(256), rounded(values, "int2", dtype).split(256), strict=True):
        magnitudes = block.double().abs()
        above = magnitudes > magnitudes.mean()
        level = torch.where(above, magnitudes[above].mean(), magnitudes[~above].mean())
        torch.testing.assert_close(found.double(), level.copysign(block), rtol=2.0**-9 + 1e-6, atol=0)


def test_two_bits_keep_most_of_a_gaussian_tail() -> None:
    """What is said of the coordinates that TopK keeps of Gaussian ones."""
    v = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    tail = v[v.abs().topk(1 << 15).indices.sort().values]
    lost = (rounded(tail, "int2", torch.float32) - tail).square().sum() / tail.square().sum()
    assert 0.002 < float(lost) < 0.01


@pytest.mark.parametrize("how", ["int4", "int2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_blocks_of_unlike_scales_all_survive(how: ValueFormat, dtype: torch.dtype) -> None:
    """One block at 1e-30 beside one at 1e30, denormals beside them: each block loses no more than by itself."""
    rng = torch.Generator().manual_seed(5)
    blocks = [torch.randn(256, generator=rng, dtype=torch.float64) * s for s in (1e-30, 1e30, 1.0, 0.0, 1e-36, 3e37)]
    values = torch.cat(blocks).to(dtype)
    whole = rounded(values, how, dtype).split(256)
    for block, found in zip(values.split(256), whole, strict=True):
        alone = rounded(block, how, dtype)
        step = float(block.abs().max()) / 7 if how == "int4" else 0.0  # to which a scale that is off may round
        assert torch.allclose(found.double(), alone.double(), rtol=2.0**-6, atol=1.01 * step)
        assert bool((found.sign() * block.sign() >= 0).all())


@pytest.mark.parametrize("how", ["int4", "int2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_in_the_message(how: ValueFormat, bad: float) -> None:
    """The guard looks at floating parts; scales in 16 bits are none, so their unit must say it."""
    values = torch.ones(600)
    values[300] = bad
    parts = encode_values(values, how)
    assert any(p.is_floating_point() and not p.isfinite().all() for p in parts.values())
    assert not decode_values(parts, how, torch.float32, 600).isfinite().all()


@pytest.mark.slow
def test_no_block_of_levels_loses_more() -> None:
    """Random search for blocks that keep less than is stated: a few large, many at or below the mean."""
    rng = torch.Generator().manual_seed(3)
    worst = 1.0
    for _ in range(1000):
        powers = torch.rand(256, generator=rng) * torch.rand(1, generator=rng) * 12
        sparse = torch.rand(256, generator=rng) < torch.rand(1, generator=rng)
        values = torch.exp(powers.double()) * sparse
        if not bool(values.any()):
            continue
        decoded = rounded(values, "int2", torch.float64)
        worst = min(worst, 1 - float((decoded - values).square().sum() / values.square().sum()))
    assert value_retention("int2") <= worst < 0.9


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 6, 255, 256, 257, 1023])
def test_all_values_come_back_and_adding_is_decoding_times_alpha(how: ValueFormat, k: int) -> None:
    rng = torch.Generator().manual_seed(k)
    values, before = torch.randn(k, generator=rng), torch.randn(k, generator=rng)
    parts, out = encode_values(values, how), before.clone()
    decoded = decode_values(parts, how, torch.float32, k)
    assert (value_count(parts, how), decoded.shape) == (k, (k,))
    assert bool((decoded.sign() * values.sign() >= 0).all())
    add_values(parts, how, out, -0.3)
    torch.testing.assert_close(out.double(), before.double() - 0.3 * decoded.double(), rtol=0, atol=1e-6)
