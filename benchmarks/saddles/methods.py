"""The optimizers: plain, with noise, with compressed gradients, and with local updates of four workers."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import packsaddle
from packsaddle import CompressedSGD, Compression, RandomK, Sign, TopK
from packsaddle.compressors import Compressor, Identity

NOISE = 0.3  # E||xi||^2 is its square
WORKERS, EVERY = 4, 8  # of local updates

Make = Callable[[Tensor, float], torch.optim.Optimizer]  # of W and the learning rate


@dataclass(frozen=True)
class Method:
    """An optimizer, the number of workers, and the compressor of local updates (None: no local updates)."""

    make: Make
    workers: int = 1
    local: Compressor | None = None


def _sgd(momentum: float) -> Make:
    return lambda w, lr: torch.optim.SGD([w], lr, momentum=momentum)


def _adamw(w: Tensor, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW([w], lr, betas=(0.9, 0.99), weight_decay=0.0)


def _muon(w: Tensor, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Muon([w], lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw")


def _compressed(compressor: Compressor, noise: float) -> Make:
    def make(w: Tensor, lr: float) -> torch.optim.Optimizer:
        settings = packsaddle.Compression(compressor, dense_below=0)
        return CompressedSGD([w], lr, settings, noise=noise / math.sqrt(w.numel()))

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


def local_settings(compressor: Compressor) -> Compression:
    """Return the settings of the exchange of local updates."""
    return Compression(compressor, dense_below=0)
