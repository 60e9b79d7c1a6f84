"""Properties that every compressor must have, each with an oracle that does not share its code."""

import torch
from torch import Tensor

from packsaddle import Compressor

SEEDS = 2000


def squared_norm(v: Tensor) -> float:
    """||v||^2 in double precision, where neither 1e30 nor a denormal over- or underflows."""
    return float(v.double().square().sum())


def assert_contracts(compressor: Compressor, v: Tensor) -> None:
    """E||v - C(v)||^2 <= (1 - mu) ||v||^2, the mean over seeds of a share in [0, 1]; 5 standard errors allowed."""
    energy = squared_norm(v)
    seeds = SEEDS if compressor.linear else 5
    lost = [squared_norm(v.double() - compressor(v, seed=s, step=3).double()) for s in range(seeds)]
    if energy == 0:
        assert max(lost) == 0
        return
    shares = torch.tensor([loss / energy for loss in lost])
    slack = 5 * float(shares.std()) / seeds**0.5 + 1e-6
    assert float(shares.mean()) <= 1 - compressor.mu(v.numel()) + slack


def assert_pure(compressor: Compressor, v: Tensor) -> None:
    """C(v) is a function of (v, seed, step): same twice, v untouched, the global random state too."""
    before, state = v.clone(), torch.random.get_rng_state()
    first = compressor(v, seed=1, step=2)
    torch.rand(3)
    torch.random.set_rng_state(state)
    assert torch.equal(first, compressor(v, seed=1, step=2))
    assert torch.equal(v, before)
    assert torch.equal(torch.random.get_rng_state(), state)


def assert_homogeneous(compressor: Compressor, v: Tensor) -> None:
    """C(2 v) = 2 C(v), which lets the error memory hold eta e instead of e."""
    doubled = compressor(v * 2, seed=4, step=5)
    assert torch.equal(doubled, compressor(v, seed=4, step=5) * 2)


def assert_linear(compressor: Compressor, v: Tensor) -> None:
    """C(a + b) = C(a) + C(b) at fixed randomness, to one rounding of the sum."""
    a, b = v, v.flip(0) * 0.5
    whole = compressor(a + b, seed=6, step=7)
    parts = compressor(a, seed=6, step=7) + compressor(b, seed=6, step=7)
    assert torch.allclose(whole, parts, rtol=2 * torch.finfo(v.dtype).eps, atol=0)


def assert_message(compressor: Compressor, v: Tensor) -> None:
    """`add_decoded` adds alpha C(v) on top of what is there, and the payload's bytes are its tensors' bytes."""
    message = compressor.encode(v, seed=8, step=9)
    out = torch.ones_like(v)
    compressor.add_decoded(message, out, alpha=-2.0)
    assert torch.allclose(out, 1 - 2 * compressor(v, seed=8, step=9), rtol=2 * torch.finfo(v.dtype).eps, atol=0)
    assert message.nbytes == sum(len(bytes(p.view(torch.uint8).tolist())) for p in message.payload)
