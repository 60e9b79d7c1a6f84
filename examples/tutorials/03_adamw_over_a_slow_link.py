# %% [markdown]
# # AdamW over a slow link
#
# Data-parallel training exchanges gradients at every step. A model of a million parameters has 4 MB of gradients, and a
# link of 50 Mbit/s carries 6 MB in a second, so the workers wait for the network. With `LocalUpdates` each worker makes
# several steps alone, and then the workers exchange the compressed changes of their parameters. Here four simulated
# workers train the same model by both methods.
#
# You need packsaddle with `pip install '.[plot,digits]'`. Run this page with
# `python examples/tutorials/03_adamw_over_a_slow_link.py`. It takes less than a minute.

# %%
import os
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import packsaddle

# %% [markdown]
# ## The task
#
# An autoencoder compresses the 8 x 8 digits of scikit-learn to 16 numbers and reconstructs them. Each of the four
# workers has a quarter of the training images.

# %%
WORKERS, STEPS, BATCH, LR = 4, 720, 16, 2e-3
images = torch.tensor(load_digits().data / 16, dtype=torch.float32)
images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
train, test = images[:1500], images[1500:]


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 16), nn.Linear(16, 256), nn.GELU(), nn.Linear(256, 64)
    )


def batches(rank: int) -> list[torch.Tensor]:
    mine, rng = train[rank::WORKERS], torch.Generator().manual_seed(rank)
    return [mine[torch.randint(len(mine), (BATCH,), generator=rng)] for _ in range(STEPS)]


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch), batch)


print(f"{sum(p.numel() for p in new_model().parameters()):,} parameters")

# %% [markdown]
# ## Gradients at every step
#
# `packsaddle.simulate(worker, workers=4)` calls `worker(rank)` for each rank, in one process. The workers exchange the
# same messages as four processes would. The first worker function averages the gradients at every step, as
# DistributedDataParallel does.


# %%
def every_step(rank: int) -> list[tuple[float, float]]:
    """Return (megabytes sent by this worker, test loss) along the training."""
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    ledger = packsaddle.Ledger()
    channel = packsaddle.comm.Communicator(packsaddle.comm.resolve(None), ledger)
    curve = []
    for step, batch in enumerate(batches(rank), start=1):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        for p in model.parameters():
            channel.mean(p.grad, "gradients")
        optimizer.step()
        if step % 24 == 0:
            with torch.no_grad():
                curve.append((ledger.total.sent / 1e6, loss_fn(model, test).item()))
    return curve


# %% [markdown]
# ## Local updates
#
# With `LocalUpdates` the loop contains no exchange, because with `every=8` every 8th call of `optimizer.step()` also
# makes an exchange. Between exchanges the workers have different parameters. The parameters on which all workers last
# agreed are the anchor, to which `at_anchor()` sets the model.


# %%
def adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=LR)]


def local_updates(every: int, compressor: packsaddle.Compressor, make=adamw) -> list[tuple[float, float]]:
    def worker(rank: int) -> list[tuple[float, float]]:
        model = new_model()
        optimizers = make(model)
        local = packsaddle.LocalUpdates(optimizers, every=every, compressor=compressor)
        curve = []
        for step, batch in enumerate(batches(rank), start=1):
            model.zero_grad()
            loss_fn(model, batch).backward()
            for optimizer in optimizers:
                optimizer.step()
            if step % 24 == 0:
                with local.at_anchor(), torch.no_grad():
                    curve.append((local.ledger.total.sent / 1e6, loss_fn(model, test).item()))
        return curve

    return packsaddle.simulate(worker, workers=WORKERS)[1]


# %% [markdown]
# ## Loss against bytes
#
# Four methods train on the same examples for the same number of steps, at one learning rate, which was not tuned.
# `small` sends the largest 1/32 of the coordinates in 2 bits each. The bytes are those that rank 1 sends.

# %%
small = packsaddle.TopK(1 / 32, values="int2")
curves = {
    "gradients, every step": packsaddle.simulate(every_step, workers=WORKERS)[1],
    "local, every 8, uncompressed": local_updates(8, packsaddle.Identity()),
    "local, every 8, TopK 1/32": local_updates(8, small),
    "local, every 24, TopK 1/32": local_updates(24, small),
}
for name, curve in curves.items():
    sent, loss = curve[-1]
    there = next((f"{at:.2f} MB" for at, loss in curve if loss < 0.02), "not reached")
    print(f"{name:30} {1000 * sent / STEPS:6.2f} kB a step, test loss {loss:.4f}, below 0.02 after {there}")

# %%
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
for (name, curve), style in zip(curves.items(), ("k.-", "C0.-", "C3.-", "C1.-"), strict=True):
    axes.plot(*zip(*curve, strict=True), style, label=name)
axes.set(xscale="log", yscale="log", xlabel="megabytes that a worker has sent", ylabel="test loss")
axes.legend(frameon=False)
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/03_adamw_over_a_slow_link.svg")

# %% [markdown]
# ![Test loss against the megabytes that a worker has sent, for four methods](03_adamw_over_a_slow_link.svg)
#
# Both axes are logarithmic. Compressed local updates every 8 steps reach a loss of 0.02 with some 130 times fewer bytes
# than gradients at every step, but after more than twice as many steps (a dot for every 24 steps). With an exchange
# every 24 steps they need still fewer bytes, and five times as many steps.
#
# So compression saves bytes and costs steps, also [on a transformer](docs/local-updates.md#what-was-measured).
#
# ## The same with Muon
#
# To train the matrices of hidden layers with Muon and the rest with AdamW, pass both optimizers to `LocalUpdates`. Here
# `Sign`, the default compressor, sends one bit for each coordinate.


# %%
def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    hidden = [model[2].weight, model[3].weight]  # Muon is not for the first and the last layer
    others = [p for p in model.parameters() if all(p is not w for w in hidden)]
    muon = torch.optim.Muon(hidden, lr=LR, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=LR)]


one_bit = packsaddle.Sign(per_tensor=True)
for name, make in {"AdamW": adamw, "Muon and AdamW": muon_and_adamw}.items():
    sent, loss = local_updates(8, one_bit, make)[-1]
    print(f"local, every 8, Sign, {name:15} {1000 * sent / STEPS:.2f} kB a step, test loss {loss:.4f}")

# %% [markdown]
# Here both methods reach about the same loss. On transformers Muon needs [far fewer steps](experiments/muon/README.md)
# than AdamW.
#
# ## The time on a link of 50 Mbit/s
#
# `packsaddle plan link` forecasts the fastest method from the link, the size of your model (`--d`), the seconds of a
# forward and backward pass on your worker (`--compute`) and the number of workers.

# %% tags=["varies"]
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where packsaddle is installed
command = "packsaddle plan link 50mbit --d 10000000 --compute 0.1 --workers 4"
print(subprocess.run(shlex.split(command), capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# The comparison uses the number of steps that each method needed on one small language model, so it is a rough guide. A
# dense step takes about 10 seconds on this link, and the workers wait during nearly all of this time. Local SGD without
# compression avoids most of the waiting, and compression avoids most of the rest. `--table` prints the forecast of
# every compressor and period.
#
# ## Next
#
# - Read about the settings of `LocalUpdates`, and how to save and resume: [local updates](docs/local-updates.md).
# - Learn when compression does not pay: [slow links](docs/slow-links.md#when-it-does-not-pay).
# - Train on real machines: [from one machine to four hosts](docs/tutorials/04_one_machine_to_four_hosts.md).
