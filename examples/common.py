"""What the examples share: data, a network, and a line that says what a worker sent."""

import hashlib

import torch
from torch import nn
from torch.utils.data import TensorDataset

import packsaddle


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return 1,437 training and 360 test images of 8 x 8 pixels, with their classes: scikit-learn's digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels, dtype=torch.int64)[order]
    return TensorDataset(x[:1437], y[:1437]), TensorDataset(x[1437:], y[1437:])


def network() -> nn.Sequential:
    """Return a classifier of 300,000 parameters."""
    return nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def report(
    rank: int,
    model: nn.Module,
    exchange: packsaddle.hooks.DDPHook | packsaddle.LocalUpdates | None,
    steps: int,
    losses: list[float],
) -> None:
    """Print a worker's line: its loss, its bytes beside DistributedDataParallel's, and a digest of its weights."""
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]  # a DTensor has a shard
    weights = torch.nn.utils.parameters_to_vector(whole).detach().float().cpu()
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    sent = "nothing sent"
    if exchange is not None and exchange.ledger.sent:
        exchanges = exchange.rounds if isinstance(exchange, packsaddle.LocalUpdates) else exchange.steps
        ours, alone = exchange.ledger.sent, exchange.uncompressed.sent
        sent = f"{exchanges} exchanges, sent {ours:,} bytes, DistributedDataParallel alone {alone:,}"
        sent += f" ({alone / ours:.1f} times as many)"
    line = f"worker {rank}: loss {first:.3f} -> {last:.3f}, {steps} steps, {sent}, weights {digest}\n"
    print(line, end="", flush=True)  # in one piece, beside other workers'
