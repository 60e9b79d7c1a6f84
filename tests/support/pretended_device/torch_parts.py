"""The Python parts of torch that a build for CPUs has not: modules of devices, storages, NCCL, and debugging."""

import contextlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

_TYPES = {"cuda": 1, "xpu": 12, "mps": 13}  # c10::DeviceType


def patch_device_module(kind: str, module: Any, devices: int) -> None:
    """Give torch.cuda, torch.xpu or torch.mps the functions that training programs call."""
    there: Any = getattr(torch, kind)
    if kind == "mps":
        torch.backends.mps.is_available = torch.backends.mps.is_built = lambda: True
        there.is_available = lambda: True
        there.synchronize = torch.accelerator.synchronize
        return
    for part in (_state(module, devices), _streams(kind), _memory(module), _random(kind, devices)):
        for name, value in part.items():
            setattr(there, name, value)
    raw: Any = torch._C
    if kind == "xpu":
        raw._xpu_getCurrentRawStream = lambda index: 0
        return
    raw._cuda_getDeviceCount = lambda: devices
    raw._cuda_isInBadFork = False
    raw._cuda_getCurrentRawStream = lambda index: 0
    raw._nccl_version, raw._nccl_version_suffix = lambda: 22707, lambda: b""
    torch.backends.cuda.is_built = lambda: True


def _index(device: Any) -> int:
    """Return the number of a device, by default the current one's."""
    if device is None:
        return int(torch.accelerator.current_device_index())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return _index(None) if index is None else index


def _state(module: Any, devices: int) -> dict[str, Any]:
    raw: Any = torch._C
    return {
        "is_available": module.use,
        "_is_compiled": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda f, **_: f(),
        "device_count": lambda: devices,
        "current_device": raw._accelerator_getDeviceIndex,
        "set_device": lambda device: raw._accelerator_setDeviceIndex(_index(device)),
        "_exchange_device": lambda i: raw._accelerator_exchangeDevice(i),
        "_maybe_exchange_device": lambda i: raw._accelerator_exchangeDevice(i),
        "get_device_properties": lambda device=None: SimpleNamespace(
            name="pretended", major=9, minor=0, total_memory=8 << 30, multi_processor_count=8
        ),
        "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0),
        "is_bf16_supported": lambda *_, **__: True,
    }


def _streams(kind: str) -> dict[str, Any]:
    raw: Any = torch._C

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Any:
            return torch.Stream.__new__(cls, device=torch.device(kind, _index(device)))  # type: ignore[call-overload]

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> Any:
            return torch.Event.__new__(cls, device=kind, enable_timing=enable_timing)

    @contextlib.contextmanager
    def stream(within: Any) -> Iterator[None]:
        if within is None:
            yield
            return
        old = raw._accelerator_getStream(within.device.index)
        raw._accelerator_setStream(within)
        try:
            yield
        finally:
            raw._accelerator_setStream(old)

    return {
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "set_stream": raw._accelerator_setStream,
        "current_stream": lambda device=None: raw._accelerator_getStream(_index(device)),
        "default_stream": lambda device=None: torch.Stream(  # type: ignore[call-overload]
            stream_id=0, device_index=_index(device), device_type=_TYPES[kind]
        ),
        "synchronize": lambda device=None: torch.accelerator.synchronize(),
    }


def _memory(module: Any) -> dict[str, Any]:
    return {
        "memory_allocated": lambda device=None: module.live_bytes(),
        "max_memory_allocated": lambda device=None: module.peak_bytes(),
        "reset_peak_memory_stats": lambda device=None: module.reset_peak(),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (4 << 30, 8 << 30),
    }


def _random(kind: str, devices: int) -> dict[str, Any]:
    generators = tuple(torch.Generator(f"{kind}:{i}") for i in range(devices))

    def seed(number: int) -> None:
        for generator in generators:
            generator.manual_seed(int(number))

    def restore(states: list[torch.Tensor]) -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    return {
        "default_generators": generators,
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda device=None: generators[_index(device)].get_state(),
        "set_rng_state": lambda state, device=None: generators[_index(device)].set_state(state),
        "get_rng_state_all": lambda: [generator.get_state() for generator in generators],
        "set_rng_state_all": restore,
    }


def patch_storages(kind: str, module: Any) -> None:
    """Give storages of the device what FSDP2 (resize_), deepcopy (clone) and torch.load need."""
    storage: Any = torch.UntypedStorage
    resize, clone = storage.resize_, storage.clone

    def resized(self: Any, size: int) -> Any:
        if self.device.type != kind:
            return resize(self, size)
        module.resize_storage(torch.empty(0, dtype=torch.uint8, device=self.device).set_(self), size)
        return self

    def moved(self: Any, device: Any) -> Any:
        return torch.empty(self.nbytes(), dtype=torch.uint8, device=device).untyped_storage().copy_(self)

    def loaded(self: Any, location: str) -> Any:
        return moved(self, location) if location.partition(":")[0] == kind else None

    storage.resize_ = resized
    storage.clone = lambda self: moved(self, self.device) if self.device.type == kind else clone(self)
    torch.serialization.register_package(5, lambda storage: None, loaded)


def patch_collectives(kind: str, module: Any) -> None:
    """Replace NCCL by the stand-in, and let gloo accept tensors of a CUDA device, as CUDA builds do."""
    if kind != "cuda":
        return
    c10d: Any = dist.distributed_c10d
    gloo, helper = c10d.ProcessGroupGloo, c10d._new_process_group_helper

    class Options:
        is_high_priority_stream = False

    class Nccl(type):
        def __call__(cls, store: Any, rank: int, size: int, options: Any) -> Any:
            by_gloo = gloo(store, rank, size, timeout=options._timeout)
            return module.collectives(by_gloo, True, options._timeout)

        def __instancecheck__(cls, other: Any) -> bool:
            return isinstance(other, module.Collectives) and bool(other.is_nccl)

    class ProcessGroupNCCL(metaclass=Nccl):
        pass

    def helped(*args: Any, **options: Any) -> Any:
        found = helper(*args, **options)
        if isinstance(group := found[0], dist.ProcessGroup):
            with contextlib.suppress(RuntimeError):  # a group of another backend
                if isinstance(backend := group._get_backend(torch.device(kind)), gloo):
                    name, staged = group.group_name, module.collectives(backend, False, backend.options._timeout)
                    group._register_backend(torch.device(kind), dist.ProcessGroup.BackendType.CUSTOM, staged)
                    group._set_group_name(name)
        return found

    ProcessGroupNCCL.Options = Options  # type: ignore[attr-defined]
    c10d.ProcessGroupNCCL = dist.ProcessGroupNCCL = ProcessGroupNCCL  # type: ignore[attr-defined]
    c10d._NCCL_AVAILABLE = True
    c10d._new_process_group_helper = helped


def patch_debugging(device: Any) -> None:
    """Let torch.cuda.set_sync_debug_mode set the mode of a CUDA device, and torch.profiler count its kernels."""
    notice = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"

    def set_mode(mode: int) -> None:
        warnings.warn(notice, stacklevel=3)  # torch gives it once
        device.sync_debug_mode = mode

    @contextlib.contextmanager
    def profile(activities: list[Any]) -> Iterator[SimpleNamespace]:
        before, kernels = device.module.launches(), SimpleNamespace(key="cudaLaunchKernel", count=0)
        yield SimpleNamespace(key_averages=lambda: [kernels])
        kernels.count = device.module.launches() - before

    there: Any = torch
    if device.kind == "cuda":
        there._C._cuda_set_sync_debug_mode, there.profiler.profile = set_mode, profile
