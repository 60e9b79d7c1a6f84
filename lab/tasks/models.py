"""The networks of the paper's experiments, small relatives of them, and a decoder-only transformer over characters.

Batch normalization with W workers: if each worker has examples of few classes, its statistics are those of its classes
and differ from the running statistics used in tests, so the network does not generalize. Statistics over all workers
equal those of one machine with the whole batch. They need two small all-reduces per layer, whose bytes are counted.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from packsaddle.comm import Communicator
from packsaddle.comm.simulation import FusedGroup
from packsaddle.curvature.narrow_convolutions import has_narrow_convolutions
from packsaddle.errors import require
from packsaddle.numerics import Stream, mix

Norm = Literal["worker", "all", "group"]
_MOMENTUM, _EPS = 0.1, 1e-5


class WorkerBatchNorm2d(nn.Module):
    """Batch normalization of float[b, c, h, w], over each worker's batch ("worker") or all workers' batches ("all").

    Running statistics are first and second moments, whose averages over workers are the moments of all batches. Call
    `connect` before training with "all". In a fused simulation, whose one process has the batches of all workers, "all"
    only counts the bytes that the workers' exchanges would send.
    """

    def __init__(self, channels: int, over: Literal["worker", "all"]) -> None:
        super().__init__()
        self.over = over
        self.channel: Communicator | None = None
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_square: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_square", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            variance = self.running_square - self.running_mean.square()
            return _normalise(x, self.running_mean, variance.clamp(min=0), self.weight, self.bias)
        channel = self.channel
        if self.over == "worker" or channel is None or channel.group.size == 1:
            return self._local(x)
        if isinstance(channel.group, FusedGroup):
            for _ in ("forward", "backward"):
                channel.mean(x.new_zeros(2 * len(self.weight)), "batch norm")
            return self._local(x)

        # Statistics over all workers: exchange the moments.
        exact = x.to(self.weight.dtype)  # 16 bits are too few for the moments and their difference, the variance
        local = torch.cat([exact.mean((0, 2, 3)), exact.square().mean((0, 2, 3))])
        mean, square = _mean_over_workers(local, channel).chunk(2)
        self._run(mean.detach(), square.detach())
        return _normalise(exact, mean, (square - mean.square()).clamp(min=0), self.weight, self.bias).to(x.dtype)

    def _local(self, x: Tensor) -> Tensor:
        mean, variance = torch.zeros_like(self.weight), torch.ones_like(self.weight)
        options: dict[str, Any] = {"training": True, "momentum": 1.0, "eps": _EPS}
        y = nn.functional.batch_norm(x, mean, variance, self.weight, self.bias, **options)
        count = x.numel() // x.shape[1]
        # The running variance that batch_norm returns is unbiased; batches are normalized by the biased variance.
        self._run(mean.detach(), (variance * ((count - 1) / count) + mean.square()).detach())
        return y

    @torch.no_grad()
    def _run(self, mean: Tensor, square: Tensor) -> None:
        self.running_mean.lerp_(mean, _MOMENTUM)
        self.running_square.lerp_(square, _MOMENTUM)


def _normalise(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = weight * (variance + _EPS).rsqrt()
    return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]


class _MeanOverWorkers(torch.autograd.Function):
    """Differentiable mean of a tensor over workers.

    Its backward pass averages the gradients, since the total loss is the mean of the workers' losses.
    """

    @staticmethod
    def forward(local: Tensor, channel: Communicator) -> Tensor:
        return channel.mean(local.detach().clone(), "batch norm")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Communicator], output: Tensor) -> None:
        ctx.channel = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _mean_over_workers(gradients[0], ctx.channel), None


def _mean_over_workers(local: Tensor, channel: Communicator) -> Tensor:
    mean: Tensor = _MeanOverWorkers.apply(local, channel)  # type: ignore[no-untyped-call]
    return mean


def make_norm(channels: int, norm: Norm) -> nn.Module:
    """Return a normalization layer for `channels` channels.

    With "group" a group has four channels, or more if there would be more than 32 groups.
    """
    if norm == "group":
        return nn.GroupNorm(max(1, min(32, channels // 4)), channels)
    return WorkerBatchNorm2d(channels, norm)


def connect(model: nn.Module, channel: Communicator) -> None:
    for module in model.modules():
        if isinstance(module, WorkerBatchNorm2d):
            module.channel = channel


@torch.no_grad()
def average_buffers(model: nn.Module, channel: Communicator) -> None:
    """Replace floating-point buffers (running statistics) with their means over workers, in place; collective."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if buffers and channel.group.size > 1:
        channel.average(buffers, "buffers")


class Attention(nn.Module):
    """Causal self-attention: position i of [b, length, width] attends to positions 0 to i."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.heads = heads
        self.inwards = linear(width, 3 * width)
        self.outwards = linear(width, width, gain)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.inwards(x).chunk(3, 2)
        )
        # The fused kernels of scaled_dot_product_attention have no second derivative, which certificates need.
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
        read = scores.masked_fill(later, -math.inf).softmax(3) @ value
        joined: Tensor = self.outwards(read.transpose(1, 2).flatten(2))
        return joined


class Block(nn.Module):
    """Pre-norm transformer block: attention, then an MLP with GELU and four times the width, each with a residual."""

    def __init__(self, width: int, heads: int, gain: float) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, gain)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(), linear(4 * width, width, gain))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class CharTransformer(nn.Module):
    """Decoder-only transformer: embeddings of characters and positions, `depth` blocks, logits of the next character.

    It has no dropout, so that the loss is a function of weights and batch only. It has no weight tying, since
    CompressedSGD rejects parameters that share memory. To suit SGD with a single step size, initial embeddings are
    small, residual branches are scaled by 1 / sqrt(2 depth), and initial logits are nearly equal, so that the initial
    loss is near log(classes).
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
        """Return the logits of the next character at every position, [b, length, classes], for int64[b, length]."""
        places = self.places.weight[: codes.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(self.characters(codes) + places)))
        return logits


def linear(width_in: int, width_out: int, gain: float = 1.0) -> nn.Linear:
    """Return a linear layer with initial bias 0.

    For inputs of variance 1, its outputs have the standard deviation `gain`.
    """
    layer = nn.Linear(width_in, width_out)
    nn.init.normal_(layer.weight, std=gain / math.sqrt(width_in))
    nn.init.zeros_(layer.bias)
    return layer


def mnist_autoencoder(*, sigmoid: bool = True) -> nn.Module:
    """Make the paper's deep MNIST autoencoder (its footnote 7), 210,369 parameters, for float[b, 1, 28, 28].

    Encoder: convolutions (16, kernel 3, stride 2, padding 1), (32, 3, 2, 1), (64, 7, 1, 0) with ReLU. "The decoder is
    symmetrical": transposed convolutions in reverse. The paper does not specify activations of the code and output
    layers; here the former has none, and the output has a sigmoid (experiments/figure2 shows results without it).
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
    return nn.Sequential(*layers, *([nn.Sigmoid()] if sigmoid else []))


def autoencoder(shape: torch.Size, widths: tuple[int, ...]) -> nn.Module:
    """Make a fully connected autoencoder with ReLU and a last sigmoid, for float[b, *shape].

    `widths` are the widths of the encoder's layers; the decoder has them in reverse.
    """
    sizes = [shape.numel(), *widths]
    sizes += sizes[-2::-1]
    layers: list[nn.Module] = [nn.Flatten()]
    for width_in, width_out in itertools.pairwise(sizes):
        layers += [nn.Linear(width_in, width_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1], nn.Sigmoid(), nn.Unflatten(1, shape))


def resnet(depth: int, classes: int, *, width: int = 64, stem: str = "small", norm: Norm = "worker") -> nn.Module:
    """Make torchvision's ResNet with `width` channels in its first stage.

    `stem` is torchvision's ("imagenet"), or for small images a 3 x 3 convolution without max pooling ("small"). `norm`
    is batch normalization per worker or over all workers, or group normalization.
    """
    vision = require("torchvision", "vision", f"ResNet-{depth}")

    def scaled(channels: int) -> int:
        return channels * width // 64

    def norm_layer(channels: int) -> nn.Module:
        return make_norm(scaled(channels), norm)

    network: nn.Module = getattr(vision.models, f"resnet{depth}")(num_classes=classes, norm_layer=norm_layer)
    if width != 64:
        _narrow(network, scaled)
    if stem == "small":
        network.conv1 = _convolution(3, width, 3, 1, 1)
        network.maxpool = nn.Identity()
    return network


def _narrow(module: nn.Module, scaled: Callable[[int], int]) -> None:
    """Replace all convolutions and the last layer of a ResNet by layers with `scaled(n)` instead of n channels."""
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
    convolution = nn.Conv2d(inside, outside, size, stride, padding, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return convolution


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Return the network that `make` makes, with initial weights that depend on `seed` only.

    torch's layers can be initialized from the global generator only, whose state is restored.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mix(seed, int(Stream.INIT)) >> 33)
        network = make()
    # Convolutions on a CPU are 25% faster in channels_last, but gradients of narrow ones are wrong in it.
    layout = torch.contiguous_format if has_narrow_convolutions(network) else torch.channels_last
    return network.to(memory_format=layout)  # type: ignore[call-overload, no-any-return]
