"""Networks of the lab as functions without arguments, for `packsaddle plan link --model lab.toys:NAME --input SHAPE`.

NAME and SHAPE are mnist_autoencoder 1x28x28, char_transformer int64:64, or resnet18, resnet34 or resnet50 3x32x32.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from lab.tasks import DataConfig, ModelConfig
from lab.tasks.models import make_task
from lab.tasks.text import load_text


def _network(name: Any, *shape: int, classes: int = 10) -> nn.Module:
    return make_task(ModelConfig(name), torch.Size(shape), classes, 0).network


def char_transformer() -> nn.Module:
    """Return the character transformer of the default configuration that `python -m lab init` writes.

    Its vocabulary is that of Python's language reference.
    """
    text = load_text(DataConfig("text"), None, train=True)
    return _network("char-transformer", DataConfig.context, classes=text.classes)


mnist_autoencoder = partial(_network, "mnist-autoencoder", 1, 28, 28)
resnet18, resnet34, resnet50 = (partial(_network, f"resnet{n}", 3, 32, 32) for n in (18, 34, 50))
