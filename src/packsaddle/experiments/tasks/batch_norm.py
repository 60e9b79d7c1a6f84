"""Batch normalisation among W workers: what "the batch" is when each worker has its own.

A worker that sees one class normalises by that class's own mean and variance, of which there is no such thing when
testing: it trains and does not generalise. Statistics over all workers are those of one machine with the whole batch,
and cost two small all-reduces a layer, which are counted. Group normalisation looks at one example at a time.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Channel

Norm = Literal["worker", "all", "group"]
_MOMENTUM, _EPS = 0.1, 1e-5


class WorkerBatchNorm2d(nn.Module):
    """Batch normalisation over each worker's batch ("worker") or all workers' ("all"); float[b, c, h, w] to the same.

    The local batch holds `parts` workers' batches, one after the other (a fused simulation; else 1). The running
    statistics are those of first and second moments, both linear in the batches, so that averaging them over workers
    gives the moments of the mixture. Before training with "all", `connect` the workers.
    """

    def __init__(self, channels: int, over: Literal["worker", "all"], parts: int = 1) -> None:
        super().__init__()
        self.over, self.parts = over, parts
        self.channel: Channel | None = None
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.running_mean: Tensor
        self.running_square: Tensor
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_square", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            variance = self.running_square - self.running_mean.square()
            return _normalise(x, self.running_mean, variance.clamp(min=0), self.weight, self.bias)
        if self.over == "worker":
            return self._apart(x)
        channel = self.channel
        if channel is not None and channel.group.size > self.parts:
            return self._exchanged(x, channel)
        if channel is not None and self.parts > 1:  # all are here: what they would have exchanged is counted
            for _ in ("forward", "backward"):
                channel.mean(x.new_zeros(2 * len(self.weight)), "batch norm")
        return self._local(x, self.weight, self.bias)

    def _apart(self, x: Tensor) -> Tensor:
        """Each part by its own moments: parts become channels."""
        n, c, h, w = x.shape
        if self.parts == 1:
            return self._local(x, self.weight, self.bias)
        beside = x.view(self.parts, n // self.parts, c, h, w).transpose(0, 1).reshape(n // self.parts, -1, h, w)
        y = self._local(beside, self.weight.repeat(self.parts), self.bias.repeat(self.parts))
        return y.view(n // self.parts, self.parts, c, h, w).transpose(0, 1).reshape(x.shape)

    def _local(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        mean, variance = torch.zeros_like(weight), torch.ones_like(weight)
        y = nn.functional.batch_norm(x, mean, variance, weight, bias, training=True, momentum=1.0, eps=_EPS)
        count = x.numel() // x.shape[1]
        # torch's running variance is unbiased; the moments are those that the batch was normalised by.
        biased = variance * ((count - 1) / count)
        self._run(mean.detach(), (biased + mean.square()).detach())
        return y

    def _exchanged(self, x: Tensor, channel: Channel) -> Tensor:
        local = torch.cat([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
        mean, square = _MeanOverWorkers.apply(local, channel).chunk(2)  # type: ignore[no-untyped-call]
        self._run(mean.detach(), square.detach())
        return _normalise(x, mean, (square - mean.square()).clamp(min=0), self.weight, self.bias)

    @torch.no_grad()
    def _run(self, mean: Tensor, square: Tensor) -> None:
        channels = len(self.running_mean)
        self.running_mean.lerp_(mean.view(-1, channels).mean(0), _MOMENTUM)
        self.running_square.lerp_(square.view(-1, channels).mean(0), _MOMENTUM)


def _normalise(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    scale = weight * (variance + _EPS).rsqrt()
    return x * scale[:, None, None] + (bias - mean * scale)[:, None, None]


class _MeanOverWorkers(torch.autograd.Function):
    """The mean over workers of a tensor. Of a mean of losses the derivative is, for each worker's part, the mean of
    the workers' derivatives."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, channel: Channel) -> Tensor:
        ctx.channel = channel
        return channel.mean(local.detach().clone(), "batch norm")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.channel.mean(gradients[0].clone(), "batch norm"), None


def make_norm(channels: int, norm: Norm, parts: int) -> nn.Module:
    """A normalisation of `channels` channels; groups have four channels, and there are at most 32 groups."""
    if norm == "group":
        return nn.GroupNorm(max(1, min(32, channels // 4)), channels)
    return WorkerBatchNorm2d(channels, norm, parts)


def connect(model: nn.Module, channel: Channel) -> None:
    """Let a model's normalisation over all workers find them."""
    for module in model.modules():
        if isinstance(module, WorkerBatchNorm2d):
            module.channel = channel


@torch.no_grad()
def average_buffers(model: nn.Module, channel: Channel) -> None:
    """Replace floating-point buffers (running statistics) by their means over workers; collective."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    if buffers and channel.group.size > 1:
        mean = channel.mean(torch.cat([b.reshape(-1) for b in buffers]), "buffers")
        for buffer, part in zip(buffers, torch.split(mean, [b.numel() for b in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))
