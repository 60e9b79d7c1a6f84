"""Copies between a device and the host, and indices, for which the host waits as rarely as possible."""

from collections.abc import Sequence
from typing import Any

import numpy as np
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
            self._event.record(torch.accelerator.current_stream(tensor.device))

    def tolist(self) -> list[Any]:
        if self._event is not None:
            self._event.synchronize()
        numbers: list[Any] = self._copy.tolist()
        return numbers


def indices_where(mask: Tensor, n: int) -> Tensor:
    """Return the indices where bool[d] is True, increasing int64[n]. They must be n; on a GPU the first n are returned,
    with zeros if there are fewer, since the host would wait for their number."""
    if mask.device.type == "cpu":  # four times as fast as torch.nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    if mask.device.type == "cuda":  # other devices may lack it
        return torch.nonzero_static(mask, size=n, fill_value=0).squeeze(1)
    # The index at its place among those that are True; the others go to place n.
    places = torch.where(mask, mask.cumsum(0) - 1, n).clamp_(max=n)
    found = torch.zeros(n + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, places, torch.arange(len(mask), device=mask.device))[:n]


def all_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors of one device on the host: themselves if they are there, else copies, for which it waits once."""
    device = tensors[0].device if tensors else torch.device("cpu")
    if not has_streams(device):
        return [tensor.cpu() for tensor in tensors]
    copies = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.accelerator.current_stream(device).synchronize()
    return copies


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy of a device's tensor on the host, which waits for the current stream alone."""
    return all_to_host([tensor])[0]


def assign(target: Tensor, value: Tensor) -> None:
    """Copy `value` to `target`. From the host to a device with streams, the host does not wait."""
    if target.device != value.device and has_streams(target.device):
        target.copy_(value.to(target.dtype).pin_memory(), non_blocking=True)
    else:
        target.copy_(value)
