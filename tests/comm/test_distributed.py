"""Real gloo processes: equal to the serial simulation, worker by worker, and equal bytes."""

from collections.abc import Callable
from itertools import product
from typing import Any

import problems
import pytest
import torch
from torch import nn

from packsaddle import CompressedSGD, Compression, Compressor, Escape, Identity, NormSketch, RandomK, TopK, simulate
from packsaddle.comm.group import resolve

COMPRESSORS: dict[str, Compressor] = {
    "Identity": Identity(),
    "RandomK": RandomK(0.25),
    "RandomK blocks": RandomK(0.5, block_size=2),
    "TopK": TopK(k=3),
}
ESCAPES: dict[str, dict[str, Any]] = {
    "off": {},
    "interval": {"interval": 6},
    "radius": {"interval": 1000, "radius": 0.3},
    "at y": {"interval": 6, "compare": "y"},
}


def toy_runs(steps: int) -> dict[tuple[str, str], dict[str, Any]]:
    """Every compressor with every escape rule, in the present group: all pairs on two workers, each once on others."""
    pairs = product(COMPRESSORS, ESCAPES) if resolve(None).size == 2 else zip(COMPRESSORS, ESCAPES, strict=True)
    return {(c, e): problems.run(COMPRESSORS[c], steps=steps, noise=0.2, **ESCAPES[e]) for c, e in pairs}


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_processes_equal_the_simulation(gloo: Callable[..., list[Any]], workers: int) -> None:
    steps = 14
    simulated = simulate(lambda rank: toy_runs(steps), workers)
    for real, serial in zip(gloo(toy_runs, workers, steps), simulated, strict=True):
        assert real.keys() == serial.keys()
        for case, run in real.items():
            for quantity in ("x", "e", "y"):
                # Sums of W doubles in another order, over stable steps.
                assert torch.allclose(run[quantity], serial[case][quantity], rtol=1e-9, atol=1e-12), (case, quantity)
            assert (run["resets"], run["bytes"]) == (serial[case]["resets"], serial[case]["bytes"]), case
            assert bool(run["resets"]) == (case[1] != "off")


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
    """A float32 network with dense and compressed parts, a sketched norm, and starts that differ over workers."""
    group = resolve(None)
    rng = torch.Generator().manual_seed(group.rank)
    model = nn.Sequential(nn.Linear(10, 60), nn.Tanh(), nn.Linear(60, 10))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=rng)
    data = torch.randn(64, 10, generator=rng)

    def loss() -> torch.Tensor:
        return (model(data) - data).square().mean()

    opt = CompressedSGD(
        model.parameters(),
        0.2,
        Compression(compressor, dense_below=100),
        noise=0.01,
        escape=Escape(15, 0.5, loss, sketch=NormSketch(3, 32)),
    )
    first = loss().item()
    for _ in range(40):
        opt.zero_grad()
        loss().backward()
        opt.step()
    return {
        "x": nn.utils.parameters_to_vector(model.parameters()).detach(),
        "error": torch.cat([s["error"].reshape(-1) for s in opt.state.values()]),
        "resets": [(r.step, r.reason, r.committed) for r in opt.resets],
        "bytes": {name: (b.payload, b.sent, b.received) for name, b in opt.ledger.by_purpose.items()},
        "fell": loss().item() < first,
    }


@pytest.mark.parametrize("compressor", [RandomK(0.1), TopK(0.1)], ids=repr)
def test_a_network_on_three_processes(gloo: Callable[..., list[Any]], compressor: Compressor) -> None:
    real = gloo(network_run, 3, compressor)
    serial = simulate(lambda rank: network_run(compressor), 3)
    for a, b in zip(real, serial, strict=True):
        assert torch.equal(a["x"], real[0]["x"])  # workers agree bit for bit
        # Single precision, 40 steps.
        assert torch.allclose(a["x"], b["x"], rtol=1e-4, atol=1e-5)
        assert torch.allclose(a["error"], b["error"], rtol=1e-3, atol=1e-5)
        assert a["resets"] == b["resets"]
        assert a["bytes"] == b["bytes"]
        assert a["fell"]
    assert not torch.allclose(real[0]["error"], real[1]["error"])  # errors are each worker's own


def test_bytes_of_a_network() -> None:
    """The ledger holds what the protocol says: a ring all-reduce of k values + dense part, an all-gather for TopK."""
    d, dense, steps, workers = 1200, 70, 40, 3
    k = d // 10
    linear, gathered = (simulate(lambda _, c=c: network_run(c), workers)[0]["bytes"] for c in (RandomK(0.1), TopK(0.1)))
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
