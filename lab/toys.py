"""Networks of the lab as functions without arguments, for `packsaddle plan link --model lab.toys:NAME --input SHAPE`:

mnist_autoencoder (--input 1x28x28), char_transformer (int64:64), resnet18, resnet34 and resnet50 (3x32x32).
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from lab.runs.config import DataConfig, ModelConfig
from lab.runs.tasks.models import make_task
from lab.runs.tasks.text import load_text


def _network(name: Any, *shape: int, classes: int = 10) -> nn.Module:
    return make_task(ModelConfig(name), torch.Size(shape), classes, 0).network


def char_transformer() -> nn.Module:
    """Return the transformer of `python -m lab init`, with the characters of Python's reference manual."""
    text = load_text(DataConfig("text"), None, train=True)
    return _network("char-transformer", DataConfig.context, classes=text.classes)


mnist_autoencoder = partial(_network, "mnist-autoencoder", 1, 28, 28)
resnet18, resnet34, resnet50 = (partial(_network, f"resnet{n}", 3, 32, 32) for n in (18, 34, 50))
