"""The networks that `packsaddle plan link --model NAME` can plan for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from packsaddle.errors import ConfigError
from packsaddle.options.schema import nearest
from packsaddle.runs.config import DataConfig, ModelConfig
from packsaddle.runs.tasks.models import make_task
from packsaddle.runs.tasks.text import load_text

# The shape of one example by model; the ResNets are packsaddle's variants for small images.
MODELS: Mapping[str, tuple[int, ...]] = {
    "mnist-autoencoder": (1, 28, 28),
    "char-transformer": (DataConfig.context,),
    **dict.fromkeys(("resnet18", "resnet34", "resnet50"), (3, 32, 32)),
}


def build_model(name: str) -> nn.Module:
    """Return a model of `packsaddle init` with seed 0; the transformer has the characters of Python's reference manual.
    Raises ConfigError for a name that is not in `MODELS`."""
    if name not in MODELS:
        raise ConfigError(f"model must be one of {', '.join(MODELS)}, got {name!r}{nearest(name, MODELS)}")
    classes = load_text(DataConfig("text"), None, train=True).classes if name == "char-transformer" else 10
    config: Any = ModelConfig
    return make_task(config(name), torch.Size(MODELS[name]), classes, 0).network
