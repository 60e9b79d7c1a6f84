"""Training of small networks with DistributedDataParallel: each worker's data, a training loop, and all compressors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

import packsaddle as ps
from packsaddle.comm.group import resolve

SEVERAL = 0.02  # size of DDP's buckets in MiB at which `network` has several of them
COMPRESSORS: dict[str, ps.Compressor] = {
    "Identity": ps.Identity(),
    "RandomK": ps.RandomK(0.05),
    "TopK": ps.TopK(0.05),
    "TopK k": ps.TopK(k=200),
    "AdaptiveTopK": ps.AdaptiveTopK(0.3),
    # Use float32 counters: in bfloat16, rounding differs between eta g and g, so that the optimizer and the hook could
    # select different coordinates.
    "SharedTopK": ps.SharedTopK(0.05, half=False),
    "SketchTopK": ps.SketchTopK(0.05, rows=3, columns=64, half=False),
    "Sign": ps.Sign(),
    "QSGD": ps.QSGD(),
    "LinearSketch": ps.LinearSketch(0.2),
    "LowRank": ps.LowRank(1),
}
# The options of all tested runs: every compressor, and the exchanges whose chunk owners keep a residual of the mean.
WAYS: dict[str, dict[str, Any]] = {
    **{name: {"compressor": c} for name, c in COMPRESSORS.items()},
    "two-way": {"compressor": ps.TopK(0.05), "exchange": "two-way"},
    "coordinator": {"compressor": ps.TopK(0.05), "exchange": "coordinator", "back": ps.RandomK(0.5)},
}


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    rng = torch.Generator().manual_seed(1)
    model = nn.Sequential(nn.Linear(30, 60), nn.Tanh(), nn.Linear(60, 60), nn.Tanh(), nn.Linear(60, 30))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.2, generator=rng)
    return model.to(dtype)


def batches(steps: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return this worker's batches, one per step."""
    rng = torch.Generator().manual_seed(100 + resolve(None).rank)
    return [torch.randn(12, 30, generator=rng).to(dtype) for _ in range(steps)]


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - batch).square().mean()


def vector(model: nn.Module) -> Tensor:
    return parameters_to_vector(model.parameters()).detach().clone()


def wrapped(model: nn.Module, cap: float = 1000.0, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, bucket_cap_mb=cap, **options)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: list[Tensor],
    *,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    accumulate: bool = False,
) -> None:
    """Train in an ordinary loop. With `accumulate` the gradients of the two halves of each batch are accumulated."""
    for batch in data:
        optimizer.zero_grad()
        halves = batch.chunk(2) if accumulate else (batch,)
        for i, half in enumerate(halves):
            if i + 1 < len(halves):
                assert isinstance(model, DistributedDataParallel)
                with model.no_sync():
                    (loss(model, half) / len(halves)).backward()
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=scaler is not None):
                value = loss(model, half) / len(halves)
            (value if scaler is None else scaler.scale(value)).backward()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
