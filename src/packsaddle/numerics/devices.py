"""Devices: accelerators, their streams and widest dtypes, and copies between a device and the host with as few waits of
the host as possible.

No other module calls torch.cuda, torch.xpu or torch.mps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def wide(device: torch.device | str) -> torch.dtype:
    """Return the widest floating-point dtype of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def widened(tensor: Tensor) -> Tensor:
    """Return the tensor in the widest dtype of its device, or the tensor itself if it has this dtype already."""
    return tensor.to(wide(tensor.device))


def device_of_doubles(device: torch.device) -> torch.device:
    """Return the device for float64 vectors that are computed from tensors on `device`: the CPU for MPS, otherwise
    `device`."""
    return device if wide(device) is torch.float64 else torch.device("cpu")


def has_streams(device: torch.device | str) -> bool:
    """Return True if a device runs work in several streams, with asynchronous copies of pinned memory. The CPU has no
    streams. MPS has one queue, whose asynchronous copies of pageable memory may read the memory after it is freed."""
    return torch.device(device).type not in ("cpu", "meta", "mps")


def new_stream(device: torch.device) -> torch.Stream | None:
    """Return a new stream of a device, or None if the device does not support several streams. The CPU and MPS do not
    support them."""
    return torch.Stream(device) if has_streams(device) else None


def use_in_current_stream(tensor: Tensor) -> None:
    """Prevent the reuse of a tensor's memory, which another stream allocated, before the current stream has used the
    tensor. Otherwise the other stream could overwrite the memory once the tensor is freed."""
    if has_streams(tensor.device):
        tensor.record_stream(torch.accelerator.current_stream(tensor.device))


def has_graphs(device: torch.device) -> bool:
    """Return True if work on a device can be captured in a CUDA graph."""
    return device.type == "cuda" and (torch.version.cuda or torch.version.hip) is not None


def check_not_capturing(call: str, device: torch.device) -> None:
    """Raise RuntimeError if a CUDA graph is being captured on `device`. The caller runs code on the host, which a
    replay of the graph would not repeat. `call` is the name by which the error message calls the caller."""
    if has_graphs(device) and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{call} is captured in a CUDA graph, whose replays would never exchange anything: capture the forward and "
            f"backward pass alone, and step outside of the graph"
        )


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`; the host does not wait for a copy from the CPU if the device has streams."""
    if tensor.device.type == "cpu" and has_streams(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def read(*tensors: Tensor) -> list[Any]:
    """Convert the tensors to Python numbers or nested lists, as `Tensor.tolist` does. The host waits only once for all
    tensors, which must be on one device."""
    if len(tensors) < 2 or all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.tolist() for tensor in tensors]
    # View the tensors as bytes, so that different dtypes can be concatenated.
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in tensors]
    pieces = torch.split(torch.cat(flat).cpu(), [len(piece) for piece in flat])
    # Copy each part, so that its memory is aligned.
    return [
        piece.clone().view(tensor.dtype).view(tensor.shape).tolist()
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


class Readback:
    """An asynchronous copy of a tensor to the host. `tolist` waits for the copy, but not for work that was queued on
    the device after it."""

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
    """Return the indices at which `mask`, bool[d], is True, in increasing order, as int64[n]. There must be exactly n
    such indices.

    On a GPU their number is not checked, since the host would wait. If there are more than n indices, the first n are
    returned. If there are fewer, zeros follow the last index.
    """
    if mask.device.type == "cpu":  # numpy is four times as fast as torch.nonzero
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    if mask.device.type == "cuda":  # other devices may lack torch.nonzero_static
        return torch.nonzero_static(mask, size=n, fill_value=0).squeeze(1)
    # Write each index where the mask is True to its place among these indices, and every other index to place n.
    places = torch.where(mask, mask.cumsum(0) - 1, n).clamp_(max=n)
    found = torch.zeros(n + 1, dtype=torch.int64, device=mask.device)
    return found.scatter_(0, places, torch.arange(len(mask), device=mask.device))[:n]


def all_to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors themselves if they are on the host. Otherwise return copies of them on the host. The host
    waits once for all copies."""
    device = tensors[0].device if tensors else torch.device("cpu")
    if not has_streams(device):
        return [tensor.cpu() for tensor in tensors]
    copies = [torch.empty_like(t, device="cpu", pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
    torch.accelerator.current_stream(device).synchronize()
    return copies


def to_host(tensor: Tensor) -> Tensor:
    """Copy a device's tensor to the host. The host waits only for the current stream."""
    return all_to_host([tensor])[0]


def assign(target: Tensor, value: Tensor) -> None:
    """Copy `value` to `target`. The host does not wait for a copy from the host to a device with streams."""
    if target.device != value.device and has_streams(target.device):
        target.copy_(value.to(target.dtype).pin_memory(), non_blocking=True)
    else:
        target.copy_(value)


def accelerator() -> str | None:
    """Return the type of the accelerator that torch can use, such as "mps", or "cuda" for GPUs of NVIDIA and AMD.
    Returns None if there is no accelerator."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def accelerators() -> dict[str, str]:
    """Return a dict from each accelerator that torch can use to its description, such as "NVIDIA H100, 80 GiB, compute
    capability 9.0"."""
    kind = accelerator()
    if kind is None:
        return {}
    return {f"{kind}:{i}": _described(kind, i) for i in range(torch.accelerator.device_count())}


def _described(kind: str, index: int) -> str:
    if kind == "mps":
        return f"Apple GPU, {torch.mps.recommended_max_memory() / 2**30:.0f} GiB"
    if kind not in ("cuda", "xpu"):
        return "not known to packsaddle"
    of: Any = torch.cuda.get_device_properties(index) if kind == "cuda" else torch.xpu.get_device_properties(index)
    capability = f", compute capability {of.major}.{of.minor}" if kind == "cuda" else ""
    return f"{of.name}, {of.total_memory / 2**30:.0f} GiB{capability}"


def synchronize() -> None:
    """Wait until the accelerator has completed its queued work. No-op if there is no accelerator."""
    if accelerator() is not None:
        torch.accelerator.synchronize()
