"""A pretended accelerator for a CPU-only torch: "cuda", "xpu" or "mps" tensors whose kernels run on the CPU.

Tensors are true tensors of the device (`x.is_cuda`, without a subclass or a mode), so that autograd, DDP's reducer,
FSDP2, futures, torch.save and torch.accelerator work, and trainings can be compared with the CPU's. What a device
refuses is refused: tensors of two devices, generators of another device, `.numpy()`, float64 on MPS, and what NCCL does
not accept. What a CPU hides is recorded in a `Log`, with the line of packsaddle that caused it:

    wait             the host waits for the device: item, nonzero, masks, blocking copies, gloo with device tensors
    background wait  the same in packsaddle's background thread, while training continues
    busy wait        the host waits for an event, after which its stream, or one that waits for it, has more to do
    race             a stream, or the host, accesses memory without waiting for the last access of another one
    freed too early  a kernel writes into memory that was freed while another stream might still use it
    unordered        a floating-point result that depends on the order of atomic additions
    async copy, collective

The waits that torch.cuda.set_sync_debug_mode("warn") finds on a GPU are warned of in that mode, and torch.profiler
counts kernels. In a fork of a process that has used the device, the device is refused, as CUDA is.

NCCL is played by gloo on the same memory. Pinned memory that the device copies asynchronously holds garbage until the
host has waited. Nothing is said about speed, overlap and deadlocks (everything runs immediately, in the host's order),
numerics of the device (TF32, other orders of sums), CUDA graphs, memory limits and NCCL's own failures.

Call `start` once in a process, which has the device until it ends.
"""

import atexit
import contextlib
import ctypes
import importlib.util
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from pretended_device.torch_parts import patch_collectives, patch_debugging, patch_device_module, patch_storages

Kind = Literal["cuda", "xpu", "mps"]
FAULTS = ("race", "freed too early")


@dataclass
class Log:
    """The events on a device, with their numbers."""

    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by kind, description and line
    launches: int = 0  # kernels

    def total(self, *kinds: str) -> int:
        return sum(n for (kind, _, _), n in self.events.items() if kind in kinds)

    def lines(self, *kinds: str) -> list[str]:
        """Describe the events of these kinds."""
        found = [(k, n, what, where) for (k, what, where), n in self.events.items() if k in kinds]
        return [f"{n} x {kind}: {what} at {where}" for kind, n, what, where in sorted(found)]


class Device:
    """The pretended device of this process."""

    def __init__(self, kind: Kind, module: Any) -> None:
        self.kind, self.module = kind, module
        self.sync_debug_mode = 0
        self._log = Log()
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p)(self._record)

    @property
    def callback(self) -> int:
        """The address of the function that records an event."""
        return ctypes.cast(self._callback, ctypes.c_void_p).value or 0

    def _record(self, kind: bytes, what: bytes) -> None:
        in_background = kind == b"wait" and threading.current_thread().name.startswith("packsaddle")
        self._log.events["background " * in_background + kind.decode(), what.decode(), _line()] += 1
        if self.sync_debug_mode and kind == b"wait" and what not in (b"synchronize", b"Event.synchronize"):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)

    @contextlib.contextmanager
    def record(self) -> Iterator[Log]:
        """Record the events within."""
        outer, self._log = self._log, Log()
        launched = self.module.launches()
        try:
            yield self._log
        finally:
            self._log.launches = self.module.launches() - launched
            outer.events.update(self._log.events)
            self._log = outer


_started: list[Device] = []  # kept alive: the library calls the device until the process ends


def start(kind: Kind, library: Path, devices: int = 1) -> Device:
    """Make torch use `devices` accelerators of this type, from the library of `build.built`."""
    spec = importlib.util.spec_from_file_location("pretended", library)
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = Device(kind, module)
    _started.append(device)
    module.start(kind, devices, device.callback)
    atexit.register(module.stop)  # what is freed later has no Python to call
    patch_device_module(kind, module, devices)
    patch_storages(kind, module)
    patch_collectives(kind, module)
    patch_debugging(device)
    return device


def _line() -> str:
    """Return the lines of packsaddle that called, the innermost first."""
    frame: FrameType | None = sys._getframe()
    chain: list[str] = []
    while frame is not None and len(chain) < 3:
        if "/packsaddle/" in (name := frame.f_code.co_filename):
            chain.append(f"{name.rpartition('/packsaddle/')[2]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(chain) or "torch or the test"
