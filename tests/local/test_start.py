"""What local updates set to rank 0's at the start: the optimizer's tensors, and those of a model that is given."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from packsaddle import Compression, Identity, LocalUpdates, simulate

WHOLE = Compression(Identity(), dense_below=0)


class Net(nn.Module):
    """A frozen base, an adapter, statistics, and a cache whose size is each worker's own; `fill` is what all are of."""

    def __init__(self, fill: float, worker: int = 0) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(30, 20).requires_grad_(False), nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5, affine=False)
        self.register_buffer("cache", torch.full((worker + 1,), fill), persistent=False)
        with torch.no_grad():
            for tensor in [*self.parameters(), *self.buffers()]:
                tensor.fill_(fill)


def begun(worker: int, differs: bool, with_model: bool, everything: bool) -> tuple[dict[str, Any], int]:
    """All tensors after construction, by name: their number; and the bytes of the start."""
    net = Net(2.0 + worker * differs, worker)
    trained = net.parameters() if everything else net.adapter.parameters()
    local = LocalUpdates(torch.optim.SGD(trained, lr=0.1), compressor=WHOLE, model=net if with_model else None)
    found = {name: set(t.flatten().tolist()) for name, t in [*net.named_parameters(), *net.named_buffers()]}
    for anchor in local.anchor().values():
        assert set(anchor.flatten().tolist()) == {2.0}
    return found, local.ledger.by_purpose["start"].sent


@pytest.mark.parametrize("with_model", [False, True])
@pytest.mark.parametrize("everything", [False, True])
def test_what_is_frozen_starts_from_rank_0(with_model: bool, everything: bool) -> None:
    """If the optimizer or a given model has it, and buffers if a model is given; no byte of anything else.

    Of tensors that are equal on all workers none are sent.
    """
    (_, sent), (found, _) = simulate(lambda worker: begun(worker, True, with_model, everything), 2)
    statistics = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    changed = {"adapter.weight", "adapter.bias"}
    changed |= {"base.weight", "base.bias"} if with_model or everything else set()
    changed |= set(statistics) if with_model else set()
    assert {name for name, values in found.items() if values == {2.0}} == changed
    (_, equal), _ = simulate(lambda worker: begun(worker, False, with_model, everything), 2)
    bytes_of_base, of_adapter, of_statistics = 4 * 620, 4 * 35, 4 * 10 + 8
    expected = of_adapter + (bytes_of_base if "base.weight" in changed else 0) + (of_statistics if with_model else 0)
    assert sent - equal == expected


def test_an_outer_optimizer_is_made_of_the_parameters_values() -> None:
    """Optimizers such as averages copy them when they are made."""
    seen = list[torch.Tensor]()

    def outer(anchors: list[torch.Tensor]) -> torch.optim.Optimizer:
        seen.extend(a.detach().clone() for a in anchors)
        return torch.optim.SGD(anchors, lr=0.7)

    x = nn.Parameter(torch.linspace(-1, 1, 7))
    LocalUpdates(torch.optim.SGD([x], lr=0.1), compressor=WHOLE, outer=outer)
    assert len(seen) == 1
    assert torch.equal(seen[0], x.detach())


def with_gaps() -> tuple[list[float], list[float]]:
    """Parameters in columns of one array, and others beside them."""
    base = torch.arange(12.0).view(6, 2) + 100 * torch.distributed.get_rank()
    LocalUpdates(torch.optim.SGD([nn.Parameter(base[:, 0])], lr=0.1), compressor=WHOLE)
    return base[:, 0].tolist(), base[:, 1].tolist()


def test_parameters_with_gaps(gloo: Callable[..., list[Any]]) -> None:
    for worker, (ours, others) in enumerate(gloo(with_gaps, 2)):
        assert ours == [0, 2, 4, 6, 8, 10]
        assert others == [100 * worker + n for n in (1, 3, 5, 7, 9, 11)]
