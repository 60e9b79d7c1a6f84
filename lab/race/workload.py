"""The networks that training benchmarks train, and their batches of real or synthetic images, or of text.

"gpt" is nanoGPT's network for a CPU (4 layers, 4 heads, width 128, 64 characters: 0.83 million parameters), and
"gpt-10m" the network of its character example (6 layers, 6 heads, width 384: 10.7 million). Their text is from a
folder, or the source of Python's standard library, see `lab.race.library`. "resnet18-16" is ResNet-18 with a
quarter of the channels.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from lab.race.library import SHA256, library_text
from lab.tasks import (
    Batches,
    DataConfig,
    Dataset,
    Images,
    ModelConfig,
    Task,
    Text,
    cut_text,
    encode_text,
    load_images,
    load_text,
    make_task,
    shard,
)

Network = Literal["mnist-autoencoder", "resnet18", "resnet18-16", "gpt", "gpt-10m"]
# A batch of images is float32[b, channels, height, width] in [0, 1] and labels int64[b]. A batch of text is two tensors
# int64[b, context]: characters, and the characters that follow them.
Batch = tuple[Tensor, Tensor]

_SHAPES: dict[str, tuple[int, int, int]] = {
    "mnist-autoencoder": (1, 28, 28),
    "resnet18": (3, 32, 32),
    "resnet18-16": (3, 32, 32),
}
_SYNTHETIC = 2048
_GPTS = {
    "gpt": ModelConfig("char-transformer", width=128, depth=4, heads=4),
    "gpt-10m": ModelConfig("char-transformer", width=384, depth=6, heads=6),
}
_IMAGE_MODELS = {
    "mnist-autoencoder": ModelConfig("mnist-autoencoder"),
    "resnet18": ModelConfig("resnet18"),
    "resnet18-16": ModelConfig("resnet18", width=16),
}
_TEXT = DataConfig("text")


@dataclass(frozen=True)
class TrainingWorkload:
    """A network and its data, with `batch` examples per worker and step.

    Without `data_dir`, images are synthetic, and text is the source of Python's standard library.
    """

    network: Network
    batch: int
    data_dir: str | None = None  # folder of MNIST, of CIFAR-10, of images of 32 x 32, or of text
    seed: int = 0

    def __post_init__(self) -> None:
        if self.network not in get_args(Network):
            raise ValueError(f"model must be one of {', '.join(get_args(Network))}, got {self.network!r}")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1 example, got {self.batch}")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"data-dir must be a folder, got {self.data_dir}")

    @property
    def reads_text(self) -> bool:
        """True if its examples are windows of text."""
        return self.network in _GPTS

    def source(self) -> str:
        """Return a description of the examples' source."""
        if self.reads_text:
            return "Python's standard library" if self.data_dir is None else "text folder"
        if self.data_dir is None:
            return "synthetic images"
        return {"mnist": "MNIST", "cifar10": "CIFAR-10", "folder": "image folder"}[self._dataset()]

    def text_hash(self) -> str:
        """Return the first 12 digits of the text's SHA-256, "" for images."""
        if not self.reads_text:
            return ""
        if self.data_dir is None:
            return LIBRARY
        parts = [self.examples(train=train) for train in (True, False)]
        texts = [part for part in parts if isinstance(part, Text)]
        return hashlib.sha256(b"".join(text.codes.numpy().tobytes() for text in texts)).hexdigest()[:12]

    def _dataset(self) -> Literal["mnist", "cifar10", "folder"]:
        if self.network == "mnist-autoencoder":
            return "mnist"
        return "folder" if (Path(self.data_dir or "") / "train").is_dir() else "cifar10"

    def examples(self, *, train: bool = True) -> Dataset:
        """Return the training or the held-out examples. Raises ConfigError if they cannot be read."""
        if self.reads_text:
            folder = None if self.data_dir is None else Path(self.data_dir)
            return load_library(_TEXT, train=train) if folder is None else load_text(_TEXT, folder, train=train)
        if self.data_dir is not None:
            return load_images(DataConfig(self._dataset()), Path(self.data_dir), train=train)
        return _synthetic(_SHAPES[self.network])

    def task(self) -> Task:
        """Return a new network, with identical weights in each call."""
        if self.reads_text:
            data = self.examples()
            return make_task(_GPTS[self.network], data.shape, data.classes, self.seed)
        return make_task(_IMAGE_MODELS[self.network], torch.Size(_SHAPES[self.network]), 10, self.seed)

    def batches(self, examples: Dataset, worker: int, workers: int) -> Callable[[int], Batch]:
        """Return this worker's batch as a function of the step."""
        mine = shard(examples, "iid", worker=worker, workers=workers, seed=self.seed)
        order = Batches(mine, self.batch, worker=worker, seed=self.seed)
        return lambda step: examples.batch(order[step], torch.device("cpu"))


def evenly_spaced(n: int, most: int) -> Tensor:
    """Return the indices of at most `most` out of n examples, evenly spaced, int64."""
    return torch.arange(0, n, max(1, n // most))[:most]


def _synthetic(shape: tuple[int, int, int]) -> Images:
    """Return noisy copies of ten random patterns, one per class: learnable data in a real dataset's shapes."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (_SYNTHETIC,), generator=rng)
    patterns = (torch.rand(10, *shape, generator=rng) < 0.2).to(torch.uint8) * 200
    noise = torch.randint(56, (_SYNTHETIC, *shape), generator=rng, dtype=torch.uint8)
    return Images(patterns[labels] + noise, labels, 255, 10)


LIBRARY = SHA256[:12]  # hash of the standard library's text, as rows record it


def load_library(config: DataConfig, *, train: bool) -> Text:
    """Load the source of Python's standard library: its last tenth, or with `train` the rest, cut into windows.

    Raises ConfigError if the running Python has a different source.
    """
    return cut_text(config, *_library(), "the standard library", train=train)


@lru_cache(maxsize=1)
def _library() -> tuple[Tensor, str]:
    """Return the character codes of the standard library's modules, int16[n], and their vocabulary."""
    return encode_text(library_text())
