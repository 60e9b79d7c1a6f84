"""Vectors that are long enough for sampling and for several blocks, and are difficult to select from or to round."""

import math
from functools import cache

import torch
from torch import Tensor


@cache
def long_vectors(d: int) -> dict[str, Tensor]:
    """Return vectors float32[d] by name. In "misleading" the sample of `selection.largest` misses all large values."""
    rng, places = torch.Generator().manual_seed(0), torch.arange(d)
    normal, sampled = torch.randn(d, generator=rng), places % max(1, d >> 16) == 0
    return {
        "normal": normal,
        "heavy tails": normal * torch.randn(d, generator=rng).exp() ** 3,
        "sparse": torch.where(torch.rand(d, generator=rng) < 0.002, normal, 0.0),
        "few values": (normal * 2).round(),
        "equal": torch.full((d,), -0.25),
        "zeros": torch.zeros(d),
        "tiny": normal * 1e-42,
        "huge": normal.clamp(-3, 3) * 1e38,
        "layers": normal * 10.0 ** -(5 * places // d),
        "misleading": torch.where(sampled, 0.0, 1.0 + places),
        "misleading the other way": torch.where(sampled, 5.0, 0.0) + places / d,
        "with infinity": torch.where(places == 17, -math.inf, normal),
        "with NaN": torch.where(places % 50_000 == 5, math.nan, normal),
    }
