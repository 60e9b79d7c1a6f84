"""A training that stalls: is it at a saddle, and does noise help? Certified, trained on with noise, certified again.

    pip install '.[digits]'  # in a clone
    python examples/stalled.py

docs/stalled.md explains what it prints.
"""

import copy

import torch
from common import digits
from torch import nn

import packsaddle

images = digits()[0].tensors[0]
batches = images.split(64)


def network() -> nn.Module:
    """Return an autoencoder with small weights, near a saddle where it gives every image the same answer."""
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 64), nn.Sigmoid())
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=1e-6, generator=rng)
    return model


def loss_fn(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(model(batch), batch)


def train(model: nn.Module, epochs: int, noise: float) -> float:
    """Train by SGD with noise of this standard deviation in each coordinate, and return the last epoch's loss."""
    optimizer = packsaddle.CompressedSGD(model.parameters(), lr=1.0, compressor=packsaddle.Identity(), noise=noise)
    loss = 0.0
    for _ in range(epochs):
        loss = 0.0
        for batch in batches:
            optimizer.zero_grad()
            value = loss_fn(model, batch)
            value.backward()
            optimizer.step()
            loss += float(value.detach()) / len(batches)
    return loss


def certify(model: nn.Module) -> packsaddle.Certificate:
    search = packsaddle.Search(generator=torch.Generator().manual_seed(0))  # the same certificate each time
    return packsaddle.certify(model, loss_fn, batches, epsilon=0.005, hessian_lipschitz=0.002, search=search)


def main() -> None:
    # The loss hardly falls any more.
    model = network()
    print(f"epoch 20: loss {train(model, 20, 0.0):.4f}")
    print(f"epoch 40: loss {train(model, 20, 0.0):.4f}\n\n{certify(model)}\n")

    # Train on from here, with and without noise; without noise at the end, which adds to the loss.
    for noise in (0.0, 0.003):
        copied = copy.deepcopy(model)
        train(copied, 60, noise)
        print(f"60 epochs with noise {noise} and 20 without: loss {train(copied, 20, 0.0):.4f}")
    print(f"\n{certify(copied)}")


if __name__ == "__main__":
    main()
