"""The one-file version of local updates trains as LocalUpdates does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from examples.simple import SimpleLocalUpdates
from packsaddle import Compression, Identity, LocalUpdates, Sign

Gloo = Callable[..., list[Any]]


def trained(simple: bool, kinds: str) -> list[Tensor]:
    """Return the parameters after each of ten steps, with rounds after every third, and after a flush."""
    model, rng = nn.Sequential(nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)).double(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, generator=rng)
    make: Any = {"AdamW": torch.optim.AdamW, "SGD": torch.optim.SGD}[kinds]
    optimizer = make(model.parameters(), lr=0.05)
    spec = Compression(Sign(per_tensor=True), exchange="direct", dense_below=30)
    local: Any = (
        SimpleLocalUpdates(optimizer, every=3, dense_below=30)
        if simple
        else LocalUpdates(optimizer, spec, every=3, mean_momentum=0.0, warn_own_state=False)
    )
    rng, seen = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(10):
        optimizer.zero_grad()
        model(torch.randn(4, 9, dtype=torch.float64, generator=rng)).square().mean().backward()
        optimizer.step()
        seen.append(nn.utils.parameters_to_vector(model.parameters()).detach().clone())
    local.flush() if simple else local.flush(Identity())
    return [*seen, nn.utils.parameters_to_vector(model.parameters()).detach().clone()]


@pytest.mark.process
@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
@pytest.mark.parametrize("workers", [2, 3])
def test_simple_is_local_updates(gloo: Gloo, kind: str, workers: int) -> None:
    simple, whole = gloo(trained, workers, True, kind), gloo(trained, workers, False, kind)
    for ours, theirs in zip(simple, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
        assert torch.equal(ours[-1], simple[0][-1])
    assert not torch.equal(simple[0][8], simple[1][8])
