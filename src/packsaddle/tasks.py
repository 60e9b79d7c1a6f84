"""What `packsaddle init` has configurations for."""

from dataclasses import dataclass, replace
from typing import Literal

from packsaddle import demo
from packsaddle.compress import RandomK, TopK
from packsaddle.config import Config, DataConfig, ModelConfig, NoiseConfig

TaskName = Literal["char-transformer", "digits", "mnist-autoencoder", "resnet18"]


@dataclass(frozen=True)
class Task:
    """Something to train, and how."""

    about: str
    config: Config
    flags: str = ""  # that `packsaddle run` needs, or begins with a space


TASKS: dict[TaskName, Task] = {
    "char-transformer": Task(
        "A small language model over the characters of Python's own reference: no download, some minutes on two cores.",
        Config(
            data=DataConfig("text"),
            model=ModelConfig("char-transformer"),
            lr=0.3,
            epochs=30.0,
            batch_size=16,
            compressor=TopK(0.01),
            workers=2,
            plateau=3.25,  # the entropy of a single character
        ),
    ),
    "digits": Task(
        "A deep autoencoder on scikit-learn's digits, from a start where SGD without noise stalls at a saddle.",
        replace(demo.configs(2)["randomk-noise"], label=""),
    ),
    "mnist-autoencoder": Task(
        "The paper's deep MNIST autoencoder (its footnote 7 and Figure 2).",
        Config(
            data=DataConfig("mnist"),
            model=ModelConfig("mnist-autoencoder"),
            lr=0.1,
            epochs=16.0,
            batch_size=64,
            compressor=RandomK(0.001),
            noise=NoiseConfig(0.01, lower_from=10.0, lower_until=14.0),
            plateau=0.095,  # the loss of the best constant grey
        ),
        " --data-dir DIR --download",
    ),
    "resnet18": Task(
        "ResNet-18 on CIFAR-10: not tuned, and for a GPU: on two cores an epoch takes half an hour or more.",
        Config(
            data=DataConfig("cifar10"),
            model=ModelConfig("resnet18"),
            lr=0.1,
            epochs=30.0,
            batch_size=64,
            compressor=TopK(0.01),
            weight_decay=5e-4,
            workers=2,
            test_every=1.0,
        ),
        " --data-dir DIR --download",
    ),
}
