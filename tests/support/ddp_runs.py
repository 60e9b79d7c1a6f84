"""Small networks behind DistributedDataParallel: data by rank, an ordinary training loop, every compressor."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

import packsaddle as ps
from packsaddle.comm.group import resolve

SEVERAL = 0.02  # MiB: the network below then has several buckets
COMPRESSORS: dict[str, ps.Compressor] = {
    "Identity": ps.Identity(),
    "RandomK": ps.RandomK(0.05),
    "RandomK per tensor": ps.RandomK(0.05, per_tensor=True),
    "TopK": ps.TopK(0.05),
    "TopK k": ps.TopK(k=200),
    "AdaptiveTopK": ps.AdaptiveTopK(0.3),
    # Counters in bfloat16 are rounded otherwise in eta g than in g, so the hook and the optimizer may choose otherwise.
    "SharedTopK": ps.SharedTopK(0.05, half=False),
    "SketchTopK": ps.SketchTopK(0.05, rows=3, columns=64, half=False),
    "Sign": ps.Sign(),
    "QSGD": ps.QSGD(),
    "LinearSketch": ps.LinearSketch(0.2),
    "LowRank": ps.LowRank(1),
}
# Every compressor, and the exchanges through owners, which keep residuals of the mean.
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
    """This worker's own data."""
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
    """An ordinary loop: the two halves of a batch one after the other if `accumulate`."""
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
