"""Groups of workers: every dtype, subgroups, and the bytes of a network in closed form.

That processes equal the simulation is in test_aggregators.py.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from packsaddle import CompressedSGD, Compression, Compressor, Escape, Identity, NormSketch, RandomK, TopK, simulate
from packsaddle.comm.group import resolve

DTYPES = (torch.int16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.bfloat16, torch.int64)


def broadcast_dtypes() -> list[list[complex]]:
    """What this worker has of rank 0's numbers, 0-dimensional, empty, with gaps, and of each dtype."""
    group, found = resolve(None), []
    for dtype in DTYPES:
        for tensor in (torch.tensor(1.0), torch.ones(0), torch.ones(3, 4)[:, ::2]):
            mine = (tensor * (1 - group.rank)).to(dtype)
            group.broadcast(mine)
            found.append(mine.to(torch.complex64).reshape(-1).tolist())
    return found


def test_every_dtype_is_broadcast(gloo: Callable[..., list[Any]]) -> None:
    for found in gloo(broadcast_dtypes, 2):
        assert found == [[1.0], [], [1.0] * 6] * len(DTYPES)


def network_run(compressor: Compressor) -> dict[str, Any]:
    """Bytes of ten steps of a float32 network with dense and compressed parts, and a sketched norm."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 10))
    data = torch.randn(64, 10, generator=torch.Generator().manual_seed(resolve(None).rank))

    def loss() -> torch.Tensor:
        return (model(data) - data).square().mean()

    escape = Escape(15, 0.5, loss, sketch=NormSketch(3, 32))
    opt = CompressedSGD(model.parameters(), 0.2, Compression(compressor, dense_below=100), noise=0.01, escape=escape)
    for _ in range(10):
        opt.zero_grad()
        loss().backward()
        opt.step()
    return {name: (b.payload, b.sent, b.received) for name, b in opt.ledger.by_purpose.items()}


def test_bytes_of_a_network() -> None:
    """The ledger holds what the protocol says: a ring all-reduce of k values + dense part, an all-gather for TopK."""
    d, dense, steps, workers = 1200, 70, 10, 3
    k = d // 10
    linear, gathered = (simulate(lambda _, c=c: network_run(c), workers)[0] for c in (RandomK(0.1), TopK(0.1)))
    ring = 2 * (workers - 1) / workers
    assert linear["values"] == (4 * k * steps, round(ring * 4 * k) * steps, round(ring * 4 * k) * steps)
    assert linear["dense"][0] == gathered["dense"][0] == 4 * dense * steps
    assert gathered["values"] == (4 * k * steps, 2 * 4 * k * steps, 2 * 4 * k * steps)
    assert "indices" not in linear
    assert gathered["indices"][0] / (k * steps) < 0.8  # bytes an index, of which a random set needs 0.58
    assert linear["escape norm"][0] == 4 * 3 * 32 * steps


def subgroup_run() -> Any:
    """Train in a subgroup of two of three processes."""
    import torch.distributed as dist

    group = dist.new_group([1, 2])
    if dist.get_rank() == 0:
        return None
    w = nn.Parameter(torch.full((4, 1), float(dist.get_rank())))
    opt = CompressedSGD([w], 1.0, compressor=Identity(), process_group=group)
    w.grad = torch.full_like(w, float(dist.get_rank()))
    opt.step()
    return w.detach()[:, 0].tolist()


def test_process_group_argument(gloo: Callable[..., list[Any]]) -> None:
    """The subgroup starts from its own first worker (1.0) and averages its own gradients (1.5)."""
    assert gloo(subgroup_run, 3) == [None, [-0.5] * 4, [-0.5] * 4]
