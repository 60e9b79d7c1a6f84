"""What the scripts of this folder share: a network, each worker's batches, and the printed line."""

import hashlib

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TOKENS, WINDOW, WORKERS = 64, 4, 2


def network() -> nn.Sequential:
    """Return a network of 32,992 parameters that predicts the next of a few counts; the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(TOKENS, 32), nn.Flatten(), nn.Linear(32 * WINDOW, 160), nn.ReLU(), nn.Linear(160, TOKENS)
    )


def batch(worker: int, step: int, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return counts modulo 64, int64[size, WINDOW], and their continuations, int64[size]; each worker's own."""
    rng = torch.Generator().manual_seed(WORKERS * step + worker)
    starts, strides = torch.randint(TOKENS, (size, 1), generator=rng), torch.randint(1, 9, (size, 1), generator=rng)
    counts = (starts + strides * torch.arange(WINDOW + 1)) % TOKENS
    return counts[:, :WINDOW], counts[:, WINDOW]


def loss_of(model: nn.Module, examples: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(examples[0]), examples[1])


def report(worker: int, model: nn.Module, sent: int) -> None:
    """Print a worker's test loss, its bytes, and a digest of its weights."""
    with torch.no_grad():
        loss = loss_of(model, batch(0, step=2**40, size=1024)).item()
    weights = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:12]
    print(f"worker {worker}: loss {loss:.5f}, sent {sent:,} bytes, weights {digest}\n", end="", flush=True)


def reduced(model: nn.Module, rounds: int) -> int:
    """Return the bytes of `rounds` all-reduces of the model in float32, of each of two workers."""
    return rounds * sum(4 * p.numel() for p in model.parameters())
