"""Worker processes: joining and leaving the process group of a launcher, and starting workers on this machine."""

import gc
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from packsaddle.comm.failures import TerminatedError, failure_of
from packsaddle.comm.group import Group, TorchGroup, launched_number
from packsaddle.errors import ConfigError
from packsaddle.numerics.devices import accelerator

_BACKENDS = {"cuda": "nccl", "xpu": "xccl"}  # backend without copies to the host, by type of device


def under_launcher() -> bool:
    """Return True if torchrun, or another launcher that sets RANK and WORLD_SIZE, started this process."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys()


def direct_backend(processes: int) -> str | None:
    """Return the backend that exchanges tensors of the accelerator without copies to the host, such as "cuda:nccl".
    Returns None if torch does not have this backend, or if the machine has fewer accelerators than `processes`."""
    kind = accelerator() or "cpu"
    name = _BACKENDS.get(kind, "")
    is_built = bool(name) and dist.is_backend_available(name)
    return f"{kind}:{name}" if is_built and torch.accelerator.device_count() >= processes else None


@contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[Group]:
    """Context manager that initializes torch's default process group from the environment variables of the launcher.
    Its backend is NCCL (xccl on XPU) if every worker has a GPU, and otherwise gloo. A collective raises
    PeerLostError if it takes longer than `timeout`, by default the default timeout of torch.distributed. Raises
    ConfigError if the group cannot be initialized."""
    local_rank, local_size = launched_number("LOCAL_RANK", 0), launched_number("LOCAL_WORLD_SIZE", 1)
    direct = direct_backend(local_size)
    if direct is not None:
        torch.accelerator.set_device_index(local_rank)
    # Even if NCCL exchanges vectors, include gloo to exchange scalars on the CPU, such as metrics and flags.
    try:
        dist.init_process_group("gloo" if direct is None else f"cpu:gloo,{direct}", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # torch raises RuntimeError for errors of stores and networks
        raise ConfigError(_not_joined(error)) from error
    group = TorchGroup()
    try:
        yield group
        with group.naming_lost_workers():
            dist.barrier()  # an early exit would close connections that other workers still use
    finally:
        # An interpreter that exits while gloo's threads are alive sometimes aborts. The threads end when the last
        # reference to the group does, and optimizers with hooks are cycles that hold one.
        dist.destroy_process_group()
        del group
        gc.collect()


def _not_joined(error: Exception) -> str:
    """Return the error message for a failed `init_process_group`: advice, then the first line of `error`."""
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        advice = f"{place} is in use; name another port with --master-port (MASTER_PORT)"
    elif "environment variable" in reason:
        advice = "start it with torchrun, which sets the variables"
    elif "joined" in reason or "imed out" in reason:
        advice = f"not every worker connected to {place} in time; check that all were started and can reach it"
    else:
        advice = f"check MASTER_ADDR and MASTER_PORT ({place}) and GLOO_SOCKET_IFNAME"
    return f"the process group cannot be initialized: {advice} ({reason})"


def preload_workers(module: str) -> None:
    """Preload `module`, torch and the compiled kernels in multiprocessing's forkserver. No-op once the server runs.
    torch._dynamo is preloaded too: the first optimizer of a process imports it, which takes as long as importing torch.
    """
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "packsaddle.numerics.kernels.preloaded", module])


# Torch's loggers that print the traceback of a failed worker. `launch` silences them, since it raises an error that
# contains the traceback.
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")


def launch(entry: Callable[..., Any], args: tuple[Any, ...], workers: int) -> Any:
    """Run entry(*args) in `workers` processes under torch's launcher and return rank 0's result. Use it in the main
    thread.

    `entry` must be importable by name; it is called with the launcher's environment variables (see `process_group`).
    Raises ConfigError if a worker raised a ConfigError, WorkerFailedError if a worker failed otherwise, TerminatedError
    on SIGTERM, and KeyboardInterrupt on SIGINT, SIGHUP and SIGQUIT. Torch forwards these signals to the workers.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Prepare the environment, which the workers inherit. Divide all cores among them; torchrun would give each worker
    # one thread.
    preload_workers(entry.__module__)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    levels = {logger: logger.level for logger in map(logging.getLogger, _LOGGERS)}
    for logger in levels:
        logger.setLevel(logging.CRITICAL + 1)

    # All workers are on one machine, so they meet by a file, and the operating system chooses the port of their store.
    # Workers are not restarted: the launch ends if a worker fails.
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=workers,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{folder}/rendezvous",
            rdzv_configs={"store_type": "file"},
            local_addr="localhost",
            max_restarts=0,
            start_method="forkserver",  # torch is imported once, in a server that forks every worker
            monitor_interval=0.1,
        )
        try:
            return elastic_launch(config, _in_worker)(entry, *args)[0]
        except ChildFailedError as error:
            raise failure_of(*error.get_first_failure()) from error
        except SignalException as stop:  # raised after the workers have ended
            raise (TerminatedError if stop.sigval == signal.SIGTERM else KeyboardInterrupt) from None
        finally:
            # Restore the loggers, and the handlers that torch's launcher has replaced.
            for logger, level in levels.items():
                logger.setLevel(level)
            for number, handler in before.items():
                if handler is not None and signal.getsignal(number) != handler:
                    signal.signal(number, handler)


def _in_worker(entry: Callable[..., Any], *args: Any) -> Any:
    """Run entry(*args) in a launched worker and return its result."""
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    # All workers are on this machine: use the loopback interface, so that no other machine can connect to them.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        os.environ.setdefault(variable, loopback[0])
    return entry(*args)


def _exit_with_launcher() -> None:
    """End this process once the launcher has exited. A launcher exits before its workers only if it was killed."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        os._exit(1)
