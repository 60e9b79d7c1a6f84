"""Convolutions whose weight gradients are wrong if oneDNN computes them in channels-last memory, and a workaround.

A convolution is affected if its kernel has size 1, its stride is above 1, and it has fewer input channels than a vector
register holds numbers: 8 with AVX2, 16 with AVX-512. If its input or its weight is in channels-last memory, oneDNN's
`backward_weights` writes past its workspace (github.com/uxlfoundation/oneDNN/issues/6035, in torch 2.13). The process
then crashes or hangs, or the gradient is silently wrong. Narrow ResNets have convolutions of this kind in their
shortcuts. If oneDNN is disabled in torch, the gradients are correct, but a narrow ResNet takes 1.5 times as long as
with oneDNN.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_REGISTER = 16  # number of float32 values in an AVX-512 register

_Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def has_narrow_convolutions(model: nn.Module) -> bool:
    return any(isinstance(module, _Convolution) and _is_narrow(module) for module in model.modules())


def _is_narrow(layer: Any) -> bool:
    inside: int = layer.out_channels if layer.transposed else layer.in_channels
    strided = any(stride > 1 for stride in layer.stride)
    return strided and all(size == 1 for size in layer.kernel_size) and inside < _REGISTER * layer.groups


@contextmanager
def safe_derivatives(model: nn.Module) -> Iterator[None]:
    """Context manager that disables oneDNN if it could compute wrong weight gradients for this network.

    That is the case if the network is on a CPU and has narrow convolutions (see the module's docstring). Their memory
    format is not checked, since a network may convert its tensors to channels-last in the forward pass.
    """
    backend: Any = torch.backends.mkldnn
    before = backend.enabled
    on_cpu = all(p.device.type == "cpu" for p in model.parameters())
    if not (before and on_cpu and has_narrow_convolutions(model)):
        yield
        return
    backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = before
