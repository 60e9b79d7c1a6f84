"""The number of coordinates that workers exchange for a model, and the measured time of CompressedSGD's update."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from packsaddle.comm.group import Solo
from packsaddle.compressors import Compressor, RandomK
from packsaddle.errors import ConfigError
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.slices import FlatParameters
from packsaddle.options.schema import nearest
from packsaddle.plan.timing import side_by_side
from packsaddle.runs.config import DataConfig, ModelConfig
from packsaddle.runs.tasks.models import CharTransformer, mnist_autoencoder, resnet
from packsaddle.runs.tasks.text import load_text
from packsaddle.sgd.optimizer import CompressedSGD

_LONG = 1 << 25  # coordinates; times for longer vectors are extrapolated in proportion to their length
_DENSE_BELOW = 1024  # elements, as in CompressedSGD


@dataclass(frozen=True)
class ModelSize:
    """The size of a model: the coordinates that one step exchanges."""

    name: str  # name of the model
    d: int  # compressed coordinates
    dense: int  # uncompressed coordinates
    shapes: tuple[torch.Size, ...] = ()  # shapes of the compressed tensors, in order; empty: unknown

    def bind(self, compressor: Compressor) -> Compressor:
        """Return the compressor bound to the shapes of the model's tensors, if known."""
        return compressor.for_tensors(self.shapes) if self.shapes else compressor

    @classmethod
    def of_size(cls, d: int) -> "ModelSize":
        """Return a size of d compressed coordinates of unknown shapes. Raises ConfigError for d < 1."""
        if d < 1:
            raise ConfigError(f"d must be at least 1, got {d}")
        return cls(f"d = {d:,}", d, 0)

    @classmethod
    def of_model(cls, name: str) -> "ModelSize":
        """Return the size of a model by its `name` in `MODELS`. Raises ConfigError for another name."""
        return cls.of_parameters(name, build_model(name).parameters())

    @classmethod
    def of_parameters(cls, name: str, trained: Iterable[nn.Parameter]) -> "ModelSize":
        """Return the size of the `trained` parameters of a model called `name`."""
        parameters = list(trained)
        flat = FlatParameters([{"params": parameters}], _DENSE_BELOW)
        return cls(name, flat.compressed_d, flat.d - flat.compressed_d, tuple(flat.shapes))


def _char_transformer() -> CharTransformer:
    """Return the character transformer of `packsaddle init`, with the character set of Python's reference manual."""
    classes = load_text(DataConfig("text"), None, train=True).classes
    defaults = ModelConfig("char-transformer")
    return CharTransformer(
        classes, DataConfig.context, width=defaults.width, depth=defaults.depth, heads=defaults.heads
    )


# Constructor of a model, and the shape of one example; the ResNets are packsaddle's variants for small images.
MODELS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mnist-autoencoder": (mnist_autoencoder, (1, 28, 28)),
    "char-transformer": (_char_transformer, (DataConfig.context,)),
    "resnet18": (partial(resnet, 18, 10), (3, 32, 32)),
    "resnet34": (partial(resnet, 34, 10), (3, 32, 32)),
    "resnet50": (partial(resnet, 50, 10), (3, 32, 32)),
}


def build_model(name: str) -> nn.Module:
    """Return a new model by its `name` in `MODELS`. Raises ConfigError for another name."""
    if name not in MODELS:
        raise ConfigError(f"model must be one of {', '.join(MODELS)}, got {name!r}{nearest(name, MODELS)}")
    with torch.random.fork_rng(devices=[]):  # layers initialize their weights from the global generator
        return MODELS[name][0]()


def update_seconds(d: int, *, noise: bool = False, repeats: int = 5, device: torch.device | str = "cpu") -> float:
    """Return the seconds by which a CompressedSGD step exceeds one of torch.optim.SGD on d coordinates, without coding.

    The error memory and, with `noise`, the noise use this time. Measured as minima over `repeats`, and on at most 2^25
    coordinates.
    """
    n = min(d, _LONG)
    gradient = torch.randn(1, n, generator=torch.Generator().manual_seed(0)).to(device)

    def stepper(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Callable[[], None]:
        weight = nn.Parameter(torch.zeros_like(gradient))
        optimizer = make([weight])

        def step() -> None:
            weight.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

        return step

    # With k = 1 coding takes no time: only error memory and noise are timed.
    spec, std = Compression(RandomK(k=1), dense_below=0), 1e-6 if noise else 0.0
    times = side_by_side(
        {
            "compressed": stepper(lambda ps: CompressedSGD(ps, 1e-6, spec, noise=std, process_group=Solo())),
            "plain": stepper(lambda ps: torch.optim.SGD(ps, 1e-6)),
        },
        repeats=repeats,
    )
    return max(0.0, times["compressed"].low - times["plain"].low) * d / n
