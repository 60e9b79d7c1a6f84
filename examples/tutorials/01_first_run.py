# %% [markdown]
# # A first run of Algorithm 1
#
# Two workers train a small network, and each sends only the largest 1% of the coordinates of its gradient. Here you see
# which bytes they send, and what the compression costs in loss.
#
# You need packsaddle with `pip install '.[plot,digits]'`. Run this page with
# `python examples/tutorials/01_first_run.py`. It takes less than a minute.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import packsaddle

# %% [markdown]
# ## The task
#
# An autoencoder encodes the 8 x 8 digits of scikit-learn in 10 numbers and reconstructs them. Each worker has half of
# the training images.

# %%
WORKERS, STEPS, BATCH, LR = 2, 470, 16, 1.0
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
train, test = images[:1500], images[1500:]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    encoder = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*encoder, nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 64))


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch), batch)


print(f"{sum(p.numel() for p in new_model().parameters()):,} parameters")

# %% [markdown]
# ## The training loop
#
# `CompressedSGD` takes the place of `torch.optim.SGD`. Its `step()` adds the worker's error memory to its gradient,
# sends the compressed sum, applies the mean of what all workers sent, and keeps the unsent rest in the error memory for
# the next step. The loop itself has no exchange.


# %%
def run(compressor: packsaddle.Compressor, rank: int) -> tuple[list[tuple[int, float, float]], packsaddle.Ledger]:
    """Train one worker; return (step, megabytes sent, test loss) along the training, and the ledger."""
    model = new_model()
    optimizer = packsaddle.CompressedSGD(model.parameters(), lr=LR, compressor=compressor)
    mine, rng = train[rank::WORKERS], torch.Generator().manual_seed(rank)
    curve = []
    for step in range(1, STEPS + 1):
        batch = mine[torch.randint(len(mine), (BATCH,), generator=rng)]
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()
        if step % 10 == 0:
            with torch.no_grad():
                curve.append((step, optimizer.ledger.total.sent / 1e6, loss_fn(model, test).item()))
    return curve, optimizer.ledger


# %% [markdown]
# `packsaddle.simulate(worker, workers=2)` calls `worker(rank)` for both ranks in one process, where they exchange the
# same messages as two processes would. Under torchrun, call `run` once in each process instead. For comparison, the
# compressor `Identity` sends all coordinates.

# %%
compressed = packsaddle.simulate(lambda rank: run(packsaddle.TopK(0.01), rank), workers=WORKERS)[1]
dense = packsaddle.simulate(lambda rank: run(packsaddle.Identity(), rank), workers=WORKERS)[1]
for name, (curve, _) in (("TopK(0.01)", compressed), ("Identity()", dense)):
    step, sent, loss = curve[-1]
    print(f"{name}: test loss {loss:.4f} after {step} steps and {sent:.2f} MB")

# %% [markdown]
# ## The ledger
#
# packsaddle counts the bytes of every exchange by [purpose](docs/api/ledger.md#purposes).

# %%
print(compressed[1])

# %% [markdown]
# `values` are the numbers that TopK kept, and `indices` their positions in the gradient. `dense` counts the biases,
# because vectors and small tensors are sent uncompressed.
#
# ## Loss against bytes

# %%
figure, (by_step, by_bytes) = plt.subplots(1, 2, figsize=(8, 3.4), sharey=True, layout="constrained")
for name, (curve, _), style in (("TopK(0.01)", compressed, "C0"), ("Identity()", dense, "k")):
    steps, sent, losses = zip(*curve, strict=True)
    by_step.plot(steps, losses, style, label=name)
    by_bytes.plot(sent, losses, style, label=name)
by_step.set(xlabel="steps", ylabel="test loss")
by_bytes.set(xscale="log", xlabel="megabytes that a worker has sent")
by_step.legend()
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/01_first_run.svg")

# %% [markdown]
# ![Test loss of both runs, against steps and against megabytes](01_first_run.svg)
#
# Against steps, the compressed run is a little behind the uncompressed run. Against megabytes, on a logarithmic axis,
# it is far ahead. How large both differences are depends on the network, the compressor and the learning rate
# ([choosing](docs/choosing.md)).
#
# ## Next
#
# - Train with AdamW and an exchange every 8 steps: [AdamW over a slow
#   link](docs/tutorials/03_adamw_over_a_slow_link.md).
# - Add noise, and prove that the network has left a saddle: [leave a
#   saddle](docs/tutorials/02_leave_a_saddle.md).
