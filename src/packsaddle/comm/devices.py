"""Devices of workers: accelerators, their streams, and the backends of process groups that carry their tensors.

No other module calls torch.cuda, torch.xpu or torch.mps. Functions on devices that do not need torch.distributed are in
`numerics.devices`.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from packsaddle.errors import ConfigError
from packsaddle.numerics.devices import has_streams

_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # backend without copies to the host, by type of device


def accelerator() -> str | None:
    """Return the type of the accelerator that torch can use, such as "mps", or "cuda" for GPUs of NVIDIA and AMD.
    Returns None if there is no accelerator."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def local_device() -> torch.device:
    """Return the accelerator with this process's LOCAL_RANK (0 if unset), or the CPU if there is no accelerator.
    Processes share accelerators if the machine has fewer accelerators than processes."""
    kind = accelerator()
    if kind is None:
        return torch.device("cpu")
    return torch.device(kind, launched_number("LOCAL_RANK", 0) % torch.accelerator.device_count())


def launched_number(name: str, default: int) -> int:
    """Return a number that the launcher has set as the environment variable `name`, such as LOCAL_RANK, or `default` if
    the variable is not set. Raises ConfigError if the variable is no integer of 0 or more."""
    text = os.environ.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(f"{name} must be an integer of 0 or more, as torchrun sets it, got {text!r}")
    return int(text)


def direct_backend(processes: int) -> str | None:
    """Return the backend that exchanges tensors of the accelerator without copies to the host, such as "cuda:nccl".
    Returns None if torch does not have this backend, or if the machine has fewer accelerators than `processes`."""
    kind = accelerator() or "cpu"
    name = _BACKENDS.get(kind, "")
    is_built = bool(name) and dist.is_backend_available(name)
    return f"{kind}:{name}" if is_built and torch.accelerator.device_count() >= processes else None


def backend_for(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Return the name of a process group's backend for the type of `device`, such as "gloo". Returns None if the group
    has no backend for this type."""
    pairs = (part.split(":") for part in dist.get_backend_config(group).split(","))
    return dict(pairs).get(device.type)


def carries(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if a process group has a backend that exchanges tensors on `device` without copies to the host. gloo
    does so only for tensors on the CPU: it copies tensors of an accelerator, and blocks the host meanwhile."""
    return backend_for(group, device) not in ((None,) if device.type == "cpu" else (None, "gloo"))


def stages(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if tensors on `device`, an accelerator, are copied to the host for a group's collectives."""
    return device.type != "cpu" and not carries(group, device)


def accepts(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Return True if a group can exchange tensors on `device`, either directly or by copies on the host."""
    return carries(group, device) or backend_for(group, torch.device("cpu")) is not None


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
