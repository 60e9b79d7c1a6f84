"""Properties of device types (float64, streams, pinned memory), determined without torch.distributed.

These functions are not in `comm.devices`, since compressors and certificates need them, but do not import `comm`.
"""

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


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on `device`; the host does not wait for a copy from the CPU if the device has streams."""
    if tensor.device.type == "cpu" and has_streams(device):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
