# %% [markdown]
# # Leave a saddle, and prove it
#
# If a training loss stands still, the run is either at a minimum or at a saddle. At both points the gradient is small,
# but the curvature differs. Here a small network starts on a saddle, as `packsaddle.certify` proves, and leaves the
# saddle with noise.
#
# You need packsaddle and matplotlib. Run this page with `python examples/tutorials/02_leave_a_saddle.py`. It takes some
# seconds.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from torch import nn

import packsaddle

# %% [markdown]
# ## A network on a saddle
#
# The network is a linear autoencoder, which encodes 64 numbers in 4 numbers. The best possible loss is that of the
# first four principal components of the data.
#
# With all weights zero and the last bias at the mean of the data, the network always returns the mean. The gradient of
# each layer is a multiple of the other layer's weights or output, which are zero. So SGD without noise cannot move.

# %%
rng = torch.Generator().manual_seed(0)
factors = torch.linalg.qr(torch.randn(64, 4, generator=rng)).Q.T  # four orthogonal directions
data = 3 * torch.randn(512, 4, generator=rng) @ factors + 0.1 * torch.randn(512, 64, generator=rng)
best = torch.linalg.svdvals(data - data.mean(0))[4:].square().sum() / data.numel()
print(f"the best loss is {best:.4f}")


def network_on_a_saddle() -> nn.Module:
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 64))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model[1].bias.copy_(data.mean(0))
    return model


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch), batch)


# %% [markdown]
# ## Certify it
#
# Two numbers define the test. `epsilon` is the largest norm of the gradient that passes. `hessian_lipschitz`, the
# paper's rho, bounds how fast the curvature changes. The smallest eigenvalue of the Hessian passes if it is at least
# -sqrt(rho epsilon), here -0.1.

# %%
EPSILON, RHO = 0.02, 0.5


def certify(model: nn.Module) -> packsaddle.Certificate:
    generator = torch.Generator().manual_seed(0)  # the same certificate each time
    search = packsaddle.Search(tolerance=0.1, generator=generator)
    return packsaddle.certify(model, loss_fn, data.split(256), epsilon=EPSILON, hessian_lipschitz=RHO, search=search)


before = certify(network_on_a_saddle())
print(before)

# %% [markdown]
# The norm of the gradient is zero up to rounding, so a test of the gradient alone would report convergence. But the
# smallest eigenvalue of the Hessian, `lambda_min`, lies in an interval far below the threshold. The upper end of this
# interval is the curvature along a direction v (`before.escape_direction`), which proves that the point is a saddle,
# and a step along v lowers the loss.
#
# `certify` computes products of the Hessian with vectors, never the Hessian itself, so it also works for millions of
# parameters.
#
# ## Train without noise and with noise
#
# `CompressedSGD`, Algorithm 1 of the paper, is SGD that sends compressed gradients and optionally adds noise, with the
# given standard deviation in each coordinate. Three runs start at the saddle. The first run has neither noise nor
# compression (`Identity`), the second run has noise, and the third run has noise and sends 5% of the coordinates in
# each step (`TopK`). With `dense_below=0` the biases are compressed too. `Ramp` lowers the noise to zero between steps
# 500 and 600, so that the gradient can become small.

# %%
STEPS, LR = 800, 0.5


def train(compressor: packsaddle.Compressor, noise: float) -> tuple[nn.Module, list[float], packsaddle.Ledger]:
    model = network_on_a_saddle()
    opt = packsaddle.CompressedSGD(
        model.parameters(),
        lr=LR,
        compressor=packsaddle.Compression(compressor, dense_below=0),
        noise=packsaddle.Ramp(noise, start=500, stop=600),
    )
    order = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        batch = data[torch.randint(len(data), (64,), generator=order)]
        opt.zero_grad()
        loss_fn(model, batch).backward()
        opt.step()
        with torch.no_grad():
            losses.append(loss_fn(model, data).item())
    return model, losses, opt.ledger


runs = {
    "no noise": train(packsaddle.Identity(), noise=0.0),
    "noise": train(packsaddle.Identity(), noise=0.0005),
    "noise, TopK 5%": train(packsaddle.TopK(0.05), noise=0.0005),
}
for name, (_, losses, ledger) in runs.items():
    print(f"{name:15} loss {losses[0]:.4f} -> {losses[-1]:.4f}   {ledger.total.payload / STEPS:6,.0f} bytes a step")

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
for (name, (_, losses, _)), style in zip(runs.items(), ("k-", "C0-", "C3--"), strict=True):
    axes.plot(range(1, STEPS + 1), losses, style, label=name)
axes.set(xlabel="step", ylabel="training loss", xlim=(0, STEPS), ylim=(0, None))
axes.legend(frameon=False)
Path("runs").mkdir(exist_ok=True)
figure.savefig("runs/02_leave_a_saddle.svg")

# %% [markdown]
# ![Training loss against steps: without noise a horizontal line, with noise a fall to near zero](02_leave_a_saddle.svg)
#
# With noise the weights move a little at random, and the negative curvature amplifies this movement at every step. Both
# runs with noise end at the best loss of this network. The compressed run sends a 14th of the bytes of the uncompressed
# run, but needs more steps. The two plateaus in its curve are further saddles, at which the network has found some of
# the four directions.
#
# ## Certify the end

# %%
for name in ("no noise", "noise, TopK 5%"):
    certificate = certify(runs[name][0])
    print(f"{name}: {certificate.verdict}")
    print(f"  gradient norm at most {EPSILON}: {certificate.grad_norm <= EPSILON}")
    print(f"  lambda_min in [{certificate.lambda_min_lower:.3f}, {certificate.lambda_min_upper:.3f}]")

# %% [markdown]
# Both gradients pass the test. The point reached without noise is a saddle. The point reached with noise is
# second-order stationary, since no curvature lies below the threshold, as the paper promises for SGD with noise.
#
# ## Next
#
# - Learn what each line of a certificate means, and how to choose rho: [certificates](docs/certificates.md).
# - Choose the standard deviation of the noise: [choosing](docs/choosing.md#how-much-noise).
# - See the effect of noise on MNIST: [Figure 2](experiments/figure2/README.md).
