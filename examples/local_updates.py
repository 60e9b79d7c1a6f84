"""A small transformer trained by local updates: AdamW on each worker, and an exchange after every 8 steps.

    pip install .  # in a clone
    torchrun --nproc-per-node 2 examples/local_updates.py
    torchrun --nproc-per-node 2 examples/local_updates.py --checkpoint runs/local --steps 240

Workers need no DistributedDataParallel. With --checkpoint FOLDER the run is saved there after every 60 steps, and goes
on from there when started again. The data are counts modulo 64 with random starts and strides.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from common import report
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import packsaddle

LENGTH, TOKENS = 16, 64


class Transformer(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(TOKENS, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        length = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, device=tokens.device)
        x = self.tokens(tokens) + self.positions.weight[:length]
        logits: Tensor = self.head(self.blocks(x, mask=mask, is_causal=True))
        return logits


def counts(seed: int, size: int = 32) -> Tensor:
    """Return sequences of counts, int64[size, LENGTH + 1]; a function of the seed, so a run can go on anywhere."""
    rng = torch.Generator().manual_seed(seed)
    starts = torch.randint(TOKENS, (size, 1), generator=rng)
    strides = torch.randint(1, 5, (size, 1), generator=rng)
    return (starts + strides * torch.arange(LENGTH + 1)) % TOKENS


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()

    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if has_gpu else "gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)

    model = Transformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=20)

    # The line: each worker steps by itself, and after every 8 steps a bit of each change travels.
    local = packsaddle.LocalUpdates(optimizer, every=8)

    # Every worker's parameters and optimizer are its own, and are saved as such.
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "local": local}
    found = packsaddle.load_checkpoint(arguments.checkpoint, parts) if arguments.checkpoint else None

    losses = []
    for step in range(found.step if found else 0, arguments.steps):
        optimizer.zero_grad()
        loss = loss_of(model, counts(seed=workers * step + rank).to(device))
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 60 == 0:
            with local.at_anchor(), torch.no_grad():  # the model that all workers have in common
                test = loss_of(model, counts(seed=2**40, size=256).to(device)).item()
            if rank == 0:
                print(f"step {step + 1}: test loss {test:.3f}")
            if arguments.checkpoint:
                packsaddle.save_checkpoint(arguments.checkpoint, parts, step=step + 1)

    local.flush()  # exchanges the pending updates
    report(rank, model, local, arguments.steps, losses)
    dist.barrier()  # a worker that leaves early takes its connections away from the others
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
