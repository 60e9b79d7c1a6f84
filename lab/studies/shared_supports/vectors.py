"""Vectors to compress: made-up ones, and the gradients of real networks, worker by worker."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lab.runs import DataConfig, ModelConfig
from lab.runs.tasks import load_data, make_task

MODELS = {
    "MNIST autoencoder": (ModelConfig(name="mnist-autoencoder"), DataConfig(name="mnist"), 0.1, 16, 300),
    "ResNet-18, 8 channels": (ModelConfig(name="resnet18", width=8), DataConfig(name="folder"), 0.05, 8, 100),
    "char transformer": (
        ModelConfig(name="char-transformer", width=64, depth=2, heads=2),
        DataConfig(name="text", context=64),
        0.3,
        4,
        200,
    ),
}  # model, data, learning rate, a worker's batch, steps before gradients are taken


def gradients(
    name: str, workers: int, steps: int, *, by_class: bool, folders: dict[str, Path | None], seed: int = 0
) -> Iterator[tuple[Tensor, float]]:
    """Yield every worker's gradient, float[W, d], and the learning rate, along `steps` steps of uncompressed SGD.

    They begin after some steps of Adam on batches of four workers, since first gradients are hardly spread.

    `by_class`: worker i has images of class i mod 10 alone, or the i-th stretch of the text; else all have all of it.
    """
    model_config, data_config, lr, batch, before = MODELS[name]
    data = load_data(data_config, folders[data_config.name], train=True)
    task = make_task(model_config, data.shape, data.classes, seed)
    parameters = list(task.parameters())
    classes = workers if data_config.name == "text" else data.classes
    owner = data.owners(classes)
    shards = [(owner == i).nonzero().squeeze(1) for i in range(classes)] if by_class else [torch.arange(len(data))]
    rng = torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(parameters, 1e-3)
    for _ in range(before):
        adam.zero_grad()
        index = torch.randint(len(data), (4 * batch,), generator=rng)
        task(*data.batch(index, torch.device("cpu"))).backward()
        adam.step()
    for _ in range(steps):
        found = []
        for worker in range(workers):
            mine = shards[worker % len(shards)]
            index = mine[torch.randint(len(mine), (batch,), generator=rng)]
            task.zero_grad()
            task(*data.batch(index, torch.device("cpu"))).backward()
            found.append(nn.utils.parameters_to_vector([_gradient(p) for p in parameters]))
        g = torch.stack(found)
        yield g, lr
        moved = nn.utils.parameters_to_vector(parameters) - lr * g.mean(0)
        nn.utils.vector_to_parameters(moved.detach(), parameters)


def _gradient(p: nn.Parameter) -> Tensor:
    return torch.zeros_like(p) if p.grad is None else p.grad


def planted(d: int, rng: torch.Generator) -> Tensor:
    """d / 1000 coordinates that have together ten times the energy of the Gaussian others."""
    k = d // 1000
    v, at = torch.randn(d, generator=rng), torch.randperm(d, generator=rng)[:k]
    v[at] += math.sqrt(10 / k) * float(v.norm()) * torch.where(torch.rand(k, generator=rng) < 0.5, -1.0, 1.0)
    return v


def student(d: int, rng: torch.Generator) -> Tensor:
    """Student's t of 3 degrees of freedom: a normal number over the root of a mean of three squares."""
    return torch.randn(d, generator=rng) / torch.randn(3, d, generator=rng).square_().mean(0).sqrt_()


def laplace(d: int, rng: torch.Generator) -> Tensor:
    """Laplace's: the difference of two exponential numbers."""
    draws = torch.rand(2, d, generator=rng).clamp_min_(1e-12).log_()
    return draws[0] - draws[1]


def gaussian(d: int, rng: torch.Generator) -> Tensor:
    return torch.randn(d, generator=rng)


MADE_UP: dict[str, Callable[[int, torch.Generator], Tensor]] = {
    "planted": planted,
    "Gaussian": gaussian,
    "Laplace": laplace,
    "Student t3": student,
}
