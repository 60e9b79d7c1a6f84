"""The optimizers: plain, with noise, with compressed gradients, and with local updates of four workers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import packsaddle
from lab.race.inner import muon
from packsaddle import CompressedSGD, Compression, RandomK, Sign, TopK
from packsaddle.compressors import Compressor, Identity

NOISE = 0.3  # E||xi||^2 is its square
WORKERS, EVERY = 4, 8  # of local updates

Tensors = Sequence[Tensor]
# Of the matrices that Muon trains, of other parameters (which it leaves to AdamW), and of the learning rate.
Make = Callable[[Tensors, Tensors, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Method:
    """The optimizers, the number of workers, and the compressor of local updates (None: no local updates)."""

    make: Make
    workers: int = 1
    local: Compressor | None = None


def _sgd(momentum: float) -> Make:
    return lambda matrices, others, lr: [torch.optim.SGD([*matrices, *others], lr, momentum=momentum)]


def _adamw(matrices: Tensors, others: Tensors, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW([*matrices, *others], lr, betas=(0.9, 0.99), weight_decay=0.0)]


def _muon(matrices: Tensors, others: Tensors, lr: float) -> list[torch.optim.Optimizer]:
    return [muon(matrices, lr, weight_decay=0.0), *(_adamw((), others, lr) if others else [])]


def _compressed(compressor: Compressor, noise: float) -> Make:
    def make(matrices: Tensors, others: Tensors, lr: float) -> list[torch.optim.Optimizer]:
        parameters = [*matrices, *others]
        settings = packsaddle.Compression(compressor, dense_below=0)
        std = noise / math.sqrt(sum(p.numel() for p in parameters))
        return [CompressedSGD(parameters, lr, settings, noise=std)]

    return make


METHODS = {
    "SGD": Method(_sgd(0.0)),
    "AdamW": Method(_adamw),
    "Muon": Method(_muon),
    "AdamW, 4 workers": Method(_adamw, WORKERS),
    "AdamW, 4 workers, local updates": Method(_adamw, WORKERS, Identity()),
    "AdamW, 4 workers, local updates, Sign": Method(_adamw, WORKERS, Sign()),
    "Muon, 4 workers": Method(_muon, WORKERS),
    "Muon, 4 workers, local updates, Sign": Method(_muon, WORKERS, Sign()),
    "SGD, noise": Method(_compressed(Identity(), NOISE)),
    "SGD, momentum 0.9": Method(_sgd(0.9)),
    "RandomK 1/16": Method(_compressed(RandomK(1 / 16), 0.0)),
    "RandomK 1/16, noise": Method(_compressed(RandomK(1 / 16), NOISE)),
    "TopK 1/16": Method(_compressed(TopK(1 / 16), 0.0)),
    "TopK 1/16, noise": Method(_compressed(TopK(1 / 16), NOISE)),
    "Sign": Method(_compressed(Sign(), 0.0)),
    "Sign, noise": Method(_compressed(Sign(), NOISE)),
}

# For networks, whose four workers divide the batch of one: training them by the mean gradient is that of one worker.
NETWORK_METHODS = {name: method for name, method in METHODS.items() if method.workers == 1 or method.local} | {
    "Muon, 4 workers, local updates": Method(_muon, WORKERS, Identity())
}


def local_settings(compressor: Compressor) -> Compression:
    """Return the settings of the exchange of local updates."""
    return Compression(compressor, dense_below=0)
