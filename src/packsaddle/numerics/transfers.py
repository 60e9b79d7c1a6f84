"""Copies of numbers from a device to the host, for which the host waits as rarely as possible."""

from typing import Any

import torch
from torch import Tensor

from packsaddle.numerics.devices import has_streams


def read(*tensors: Tensor) -> list[Any]:
    """Return the numbers of each tensor, as its `tolist` does. The host waits once for all tensors of a device."""
    if len(tensors) < 2 or all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.tolist() for tensor in tensors]
    # As bytes, so that tensors may have any dtypes.
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    pieces = torch.split(torch.cat(flat).cpu(), [len(piece) for piece in flat])
    # Copied, so that their memory is aligned.
    return [
        piece.clone().view(tensor.dtype).view(tensor.shape).tolist()
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


class Readback:
    """A copy of a tensor to the host, begun here. `tolist` waits for this copy, and not for work that the device was
    given since then."""

    def __init__(self, tensor: Tensor) -> None:
        self._event = None
        self._copy = tensor
        if has_streams(tensor.device):
            self._copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
            self._event = torch.Event(tensor.device)
            self._event.record()

    def tolist(self) -> list[Any]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers
