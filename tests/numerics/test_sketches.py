"""The norm sketch is linear and keeps its variance on spread, concentrated and periodic vectors."""

import math

import pytest
import torch
from torch import Tensor

from packsaddle import NormSketch

RNG = torch.Generator().manual_seed(3)
VECTORS = {
    "gaussian": torch.randn(3001, generator=RNG, dtype=torch.float64),
    "spike": (torch.arange(2000) == 777).double() * 5,
    "two spikes": (torch.arange(2000) % 1024 == 10).double(),
    # All the energy in one residue class: fatal to a sketch whose chunks are not rotated.
    "periodic": (torch.arange(4096) % 16 == 3).double(),
    "constant": torch.ones(2500, dtype=torch.float64),
}
by_vector = pytest.mark.parametrize("v", VECTORS.values(), ids=VECTORS.keys())


def test_linear() -> None:
    sketch = NormSketch(rows=3, columns=16)
    a, b = VECTORS["gaussian"], VECTORS["gaussian"].flip(0)
    encode = lambda v: sketch.encode(v, seed=1, step=2)  # noqa: E731
    assert encode(a).shape == (3, 16)
    assert torch.allclose(encode(a + 2 * b), encode(a) + 2 * encode(b), rtol=1e-12, atol=1e-12)


@by_vector
def test_energy_is_unbiased_with_the_stated_variance(v: Tensor) -> None:
    """E Z = ||v||^2 and Var Z <= (2 / columns) ||v||^4 for one row, over 1,500 hashes."""
    columns, energy = 16, float(v.square().sum())
    sketch = NormSketch(rows=1, columns=columns)
    z = torch.tensor([sketch.norm(sketch.encode(v, seed=s, step=0)) ** 2 / energy for s in range(1500)])
    standard_error = float(z.std()) / math.sqrt(len(z))
    assert abs(float(z.mean()) - 1) <= 5 * standard_error + 1e-9
    # The sample variance of 1,500 heavy-tailed values is within 35% of its own expectation.
    assert float(z.var()) <= 1.35 * 2 / columns


def test_short_vectors_are_exact() -> None:
    sketch, v = NormSketch(rows=2, columns=8), torch.arange(16.0)
    assert torch.equal(sketch.encode(v, seed=0, step=0), v)
    assert sketch.norm(v) == pytest.approx(float(v.norm()))


def test_long_vectors_go_through_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    v = VECTORS["gaussian"]
    monkeypatch.setattr("packsaddle.numerics.sketches._SLAB", 64)
    sketch = NormSketch(rows=9, columns=32)
    assert sketch.norm(sketch.encode(v, seed=0, step=0)) == pytest.approx(float(v.norm()), rel=0.25)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="columns of NormSketch must be at least 1, got 0"):
        NormSketch(columns=0)
