"""Global state of a process that a test's call has changed: it is restored, or reported if that is impossible."""

import gc
import os
import random
import signal
import sys
import threading
import warnings
from functools import _lru_cache_wrapper
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

_settled: list[Any] = []  # caches that the garbage collector no longer lists, since they are frozen


class State:
    """A snapshot of the global state of this process, to which `restore` returns."""

    def __init__(self) -> None:
        self._environment, self._folder, self._path = dict(os.environ), Path.cwd(), list(sys.path)
        self._handlers = {s: signal.getsignal(s) for s in signal.valid_signals()}
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        self._torch = torch.get_rng_state(), torch.get_default_dtype(), torch.get_num_threads()
        self._device = torch.get_default_device()
        self._random = random.getstate(), np.random.get_state()
        self._threads = set(threading.enumerate())
        self._names = _names()

    def restore(self) -> list[str]:
        """Restore the state as far as possible, and return descriptions of the changes that remain.

        Then all objects are frozen (`gc.freeze`): otherwise the garbage collector would visit all of torch's modules
        after every call.
        """
        os.environ.clear()
        os.environ.update(self._environment)
        os.chdir(self._folder)
        sys.path[:] = self._path
        for number, handler in self._handlers.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)
        self._warnings.__exit__()
        self._restore_torch()
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        gc.freeze()
        return [*self._threads_left(), *self._names_changed(), *["a process group"] * dist.is_initialized()]

    def _restore_torch(self) -> None:
        """Restore torch's state, and clear its caches of compiled functions and of meshes with destroyed groups."""
        rng, dtype, threads = self._torch
        torch.set_rng_state(rng)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        if torch.get_default_device() != self._device:
            torch.set_default_device(self._device)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(False)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()
        forget_meshes()

    def _threads_left(self) -> list[str]:
        """Return the new threads that still run, except those of the kernels' pool and threads not made by Python."""
        ours = [t for t in threading.enumerate() if t not in self._threads and t.is_alive()]
        return [t.name for t in ours if not isinstance(t, threading._DummyThread) and t.name[:10] != "packsaddle"]

    def _names_changed(self) -> list[str]:
        """Return the names in packsaddle whose objects were replaced. Modules that were imported since do not count."""
        now, found = _names(), []
        for where, before in self._names.items():
            after = now.get(where, {})
            names = [name for name in before.keys() | after.keys() if before.get(name) is not after.get(name)]
            found += [f"{where}.{name}" for name in names if _changed(before.get(name), after.get(name))]
        return found


def _changed(was: Any, now: Any) -> bool:
    """Return True if a name was patched.

    A module that was imported is not a patch, nor is the timer that torch adds to an optimizer's step.
    """
    timed = getattr(now, "hooked", False) and getattr(now, "__wrapped__", None) is was
    return not isinstance(now, ModuleType) and not timed


def _names() -> dict[str, dict[str, Any]]:
    """Return {name: object} for each of packsaddle's modules and for the classes in them."""
    found = {}
    for module_name, module in list(sys.modules.items()):
        if module_name.partition(".")[0] != "packsaddle":
            continue
        # Names that begin with two underscores are made by the interpreter or torch.compile, except __version__.
        found[module_name] = {k: v for k, v in vars(module).items() if not k.startswith("__") or k == "__version__"}
        for value in vars(module).values():
            if isinstance(value, type) and value.__module__ == module_name:
                plain = {k: v for k, v in vars(value).items() if not k.startswith("__")}
                found[f"{module_name}.{value.__qualname__}"] = plain
    return found


def forget_meshes() -> None:
    """Clear torch's caches of device meshes, whose groups were destroyed with the default group."""
    _settled.extend(_caches())
    if "torch.distributed.tensor" in sys.modules:
        for cache in _settled:
            cache.cache_clear()
        if hasattr(torch._C, "_clear_DTensor_sharding_propagator_cache"):
            torch._C._clear_DTensor_sharding_propagator_cache()


def _caches() -> list[Any]:
    """Return the function caches of torch.distributed, since some of them contain device meshes."""
    found = [x for x in gc.get_objects() if type(x) is _lru_cache_wrapper]  # isinstance would call code of proxies
    return [x for x in found if str(getattr(x, "__module__", "")).startswith("torch.distributed")]


def forget_tests() -> None:
    """Remove test modules from sys.modules, so that the next call imports them again.

    This module and those that serve calls are kept.
    """
    here = f"{Path(__file__).parents[1]}{os.sep}"  # text, since comparing thousands of paths would be slow
    for name in sys.modules.keys() - {"__main__", "__mp_main__", "gloo", __name__}:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(here):
            del sys.modules[name]
