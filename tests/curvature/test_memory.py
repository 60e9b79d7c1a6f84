"""The memory that a certificate needs besides the model: a few vectors of d float64 numbers, and the Lanczos vectors of
the sample."""

from functools import partial

import pytest
import torch
from memory import peak_bytes
from searches import certified
from torch import nn


@pytest.mark.parametrize(("hvp", "most"), [("double-backward", 7), ("differences", 8)])
def test_vectors_of_a_certificate(hvp: str, most: int) -> None:
    """Besides the sample's Lanczos vectors these are two derivatives of a batch (of the parameters' dtype), their sum,
    the gradient, v, the parameters to be restored, and another product; or for differences one derivative of a batch
    and three products, to compare steps."""
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 400), nn.Tanh(), nn.Linear(400, 1)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.1 * torch.randn(p.shape, generator=rng, dtype=p.dtype))
    batches = list(torch.randn(64, 100, generator=rng, dtype=torch.float64).split(8))
    d = sum(p.numel() for p in model.parameters())

    def held(products: int) -> float:
        options = {"epsilon": None, "hessian_lipschitz": None, "hvp": hvp, "max_hvps": products}
        run = partial(certified, model, lambda model, x: model(x).square().mean(), batches, **options)
        return peak_bytes(run) / (8 * d)

    few, many = held(8), held(14)
    # Each product on the sample keeps one vector, and one whose error is checked holds another.
    assert 5.9 < many - few < 7.1
    assert many - 15 < most + 0.2
