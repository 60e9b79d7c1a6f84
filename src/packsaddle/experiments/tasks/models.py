"""The networks of the paper's experiments, small relatives of them, and a decoder-only transformer over characters."""

import itertools
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from packsaddle.errors import ConfigError, require
from packsaddle.experiments.config import ModelConfig
from packsaddle.experiments.tasks.batch_norm import Norm, make_norm


class Attention(nn.Module):
    """Causal self-attention: position i of [b, length, width] sees positions 0 to i."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.inwards = linear(width, 3 * width)
        self.outwards = linear(width, width, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return what each position reads, [b, length, width]."""
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.inwards(x).chunk(3, 2)
        )
        # Spelled out: the fused kernels of scaled_dot_product_attention have no second derivative, which
        # certificates need; at 64 characters they would save a few percent of a step.
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        read = scores.masked_fill(later, -math.inf).softmax(3) @ value
        joined: Tensor = self.outwards(read.transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """Attention, then a GELU network of four times the width, each added to its input after a norm of it."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, gain)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width, gain))

    def forward(self, x: Tensor) -> Tensor:
        """Map [b, length, width] to the same."""
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class CharTransformer(nn.Module):
    """`depth` blocks between learned embeddings of characters and places, and logits of the next character.

    Without dropout, so that the loss is a function of weights and batch alone; input and output embeddings are two
    tensors, since CompressedSGD refuses parameters that share memory. It starts with small embeddings, whose gradients
    the first norms then enlarge, as SGD of one step size for all needs; with residual branches that add up to about
    the width of one; and with nearly even logits, so at a loss near log(classes).
    """

    def __init__(self, classes: int, context: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(classes, width), nn.Embedding(context, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.1)
        gain = 1 / math.sqrt(2 * depth)
        self.blocks = nn.Sequential(*(Block(width, heads, gain) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, classes, 0.1)

    def forward(self, codes: Tensor) -> Tensor:
        """Return the logits of every next character, [b, length, classes], from codes int64[b, length], length at
        most the context."""
        places = self.places.weight[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(codes) + places)))
        return logits


def linear(width_in: int, width_out: int, gain: float = 1.0) -> nn.Linear:
    """A linear layer that starts without bias and turns inputs of variance 1 into outputs of deviation `gain`."""
    layer = nn.Linear(width_in, width_out)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(width_in))
    nn.init.zeros_(layer.bias)
    return layer


def mnist_autoencoder(output: str = "sigmoid") -> nn.Module:
    """The paper's deep MNIST autoencoder (its footnote 7), 210,369 parameters; [b, 1, 28, 28] to the same.

    Encoder: convolutions (16, kernel 3, stride 2, padding 1), (32, 3, 2, 1), (64, 7, 1, 0) with ReLU. "The
    decoder is symmetrical": transposed convolutions in reverse. Open in the paper: nothing follows the code
    layer, and the output passes a sigmoid (see experiments/figure2 for what happens without it).
    """
    layers = [
        nn.Conv2d(1, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 7),
        nn.ConvTranspose2d(64, 32, 7),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 3, stride=2, padding=1, output_padding=1),
    ]
    return nn.Sequential(*layers, *_last(output))


def _last(output: str) -> list[nn.Module]:
    return [nn.Sigmoid()] if output == "sigmoid" else []


def autoencoder(shape: torch.Size, widths: tuple[int, ...], output: str = "sigmoid") -> nn.Module:
    """A fully connected autoencoder with ReLU, mirrored; [b, *shape] to the same."""
    sizes = [shape.numel(), *widths]
    sizes += sizes[-2::-1]
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in itertools.pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1], *_last(output), nn.Unflatten(1, shape))


def resnet(
    depth: int, classes: int, *, width: int = 64, stem: str = "small", norm: Norm = "worker", parts: int = 1
) -> nn.Module:
    """torchvision's ResNet of `width` channels in its first stage, with its own stem ("imagenet") or the one for small
    images (a 3 x 3 convolution, no max pooling), and a normalisation (see `packsaddle.experiments.tasks.batch_norm`,
    also for `parts`)."""
    vision = require("torchvision", "vision", f"ResNet-{depth}")

    def scaled(channels: int) -> int:
        return channels * width // 64

    def norm_layer(channels: int) -> nn.Module:
        return make_norm(scaled(channels), norm, parts)

    network: nn.Module = getattr(vision.models, f"resnet{depth}")(num_classes=classes, norm_layer=norm_layer)
    if width != 64:
        _narrow(network, scaled)
    if stem == "small":
        network.conv1 = _convolution(3, width, 3, 1, 1)
        network.maxpool = nn.Identity()
    return network


def _narrow(module: nn.Module, scaled: Callable[[int], int]) -> None:
    """Replace every convolution and the last layer of a ResNet by one with as many times the channels."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            inside = child.in_channels if child.in_channels == 3 else scaled(child.in_channels)
            size, stride, padding = child.kernel_size[0], child.stride[0], int(child.padding[0])
            setattr(module, name, _convolution(inside, scaled(child.out_channels), size, stride, padding))
        elif isinstance(child, nn.Linear):
            setattr(module, name, nn.Linear(scaled(child.in_features), child.out_features))
        else:
            _narrow(child, scaled)


def _convolution(inside: int, outside: int, size: int, stride: int, padding: int) -> nn.Conv2d:
    """A convolution without bias, initialised as torchvision's ResNets are."""
    convolution = nn.Conv2d(inside, outside, size, stride, padding, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


class Task(nn.Module):
    """A network with its loss: mean squared reconstruction error, or cross entropy, on normalised images or per
    character of text."""

    def __init__(self, config: ModelConfig, shape: torch.Size, classes: int, parts: int = 1) -> None:
        super().__init__()
        self.reads_text = config.name == "char-transformer"
        self.classifies = self.reads_text or config.name.startswith("resnet")
        if self.reads_text != (len(shape) == 1):
            examples = "data.name = 'text'" if self.reads_text else "images"
            raise ConfigError(f"model {config.name} needs {examples}, got examples of shape {list(shape)}")
        if self.reads_text:
            self.network: nn.Module = CharTransformer(
                classes, shape[0], width=config.width, depth=config.depth, heads=config.heads
            )
        elif config.name == "mnist-autoencoder":
            if tuple(shape) != (1, 28, 28):
                raise ConfigError(f"model mnist-autoencoder needs 1 x 28 x 28 images, got {list(shape)}")
            self.network = mnist_autoencoder(config.output)
        elif config.name == "autoencoder":
            self.network = autoencoder(shape, config.widths, config.output)
        else:
            if shape[0] != 3:
                raise ConfigError(f"model {config.name} needs images of 3 channels, got {list(shape)}")
            depth = int(config.name.removeprefix("resnet"))
            options = {"width": config.width, "stem": config.stem, "norm": config.norm}
            self.network = resnet(depth, classes, **options, parts=parts)  # type: ignore[arg-type]

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch: pixels float[b, c, h, w] in [0, 1] and labels int64[b], or windows of text
        and the characters that follow, int64[b, context] both."""
        if not self.classifies:
            return nn.functional.mse_loss(self.network(inputs), inputs)
        return nn.functional.cross_entropy(self._logits(inputs).flatten(0, -2), targets.flatten())

    def correct(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return how many of a batch are predicted right; a window counts as the share of its characters that are."""
        hits = (self._logits(inputs).argmax(-1) == targets).sum()
        return hits * len(targets) / targets.numel()

    def _logits(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.network(inputs if self.reads_text else normalise(inputs))
        return logits  # float[b, classes], or float[b, context, classes]


def normalise(pixels: Tensor) -> Tensor:
    """Map [0, 1] to [-2, 2], near zero mean and unit variance for natural images."""
    return (pixels - 0.5) * 4.0


def make_task(config: ModelConfig, shape: torch.Size, classes: int, seed: int, parts: int = 1) -> Task:
    """Build a task from its own random start, a function of the seed; the global random state is restored.

    `parts`: how many workers' batches its batch holds, one after the other (see
    `packsaddle.experiments.tasks.batch_norm`).
    """
    # torch's layers initialise themselves from the global generator and offer no other way.
    with torch.random.fork_rng(devices=[]):
        _check_memory(config, shape, classes)
        torch.manual_seed(seed)
        return Task(config, shape, classes, parts)


def _check_memory(config: ModelConfig, shape: torch.Size, classes: int) -> None:
    """Raise ConfigError for a network that this machine's memory cannot hold, before any of it is taken."""
    try:
        with torch.device("meta"):  # shapes without memory
            needed = sum(p.numel() * p.element_size() for p in Task(config, shape, classes).parameters())
    except (RuntimeError, OverflowError):
        needed = 2**63  # sizes that overflow
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else math.inf
    if needed > there:
        raise ConfigError(f"model {config.name} takes {needed / 1e9:,.1f} GB, more than the {there / 1e9:,.1f} here")
