"""The battery of nasty vectors that every compressor is tried on."""

import torch
from torch import Tensor


def battery() -> dict[str, Tensor]:
    """Return flat vectors by name."""
    rng = torch.Generator().manual_seed(0)
    gaussian = torch.randn(50, generator=rng)
    spike = torch.zeros(40)
    spike[17] = -3.0
    denormal = torch.full((30,), 1e-42)
    denormal[::3] *= -2
    return {
        "gaussian": gaussian,
        "double": torch.randn(33, generator=rng, dtype=torch.float64),
        "half": torch.randn(20, generator=rng).to(torch.bfloat16),
        "zeros": torch.zeros(25),
        "one spike": spike,
        "all equal": torch.full((24,), 0.5),
        "ties of both signs": torch.tensor([1.0, -1.0] * 16),
        "denormal": denormal,
        "huge": gaussian * 1e30,
        "tiny": gaussian * 1e-30,
        "heavy tail": 1.0 / torch.arange(1, 61, dtype=torch.float32) ** 2,
        "wide range": torch.logspace(-30, 30, 41),
        "negative zero": torch.tensor([-0.0, 0.0, 2.0, -0.0]),
        "one coordinate": torch.tensor([-7.0]),
        "two coordinates": torch.tensor([1.0, -2.0]),
    }
