"""Worker processes: reading the launcher's environment variables, joining and leaving the process group, and starting
and ending workers.

torchrun's store survives a restart (torch 2.13) and still contains the addresses of the old workers, to which new
workers would try to connect indefinitely. So at each start all workers agree on a new key prefix in the store. With
several machines the number of restarts cannot be the prefix, since each torchrun counts its own.
"""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta
from functools import partialmethod
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessContext

from packsaddle.comm.devices import direct_backend
from packsaddle.comm.failures import TerminatedError, failure_of
from packsaddle.comm.group import Group, TorchGroup
from packsaddle.errors import ConfigError
from packsaddle.messages import shown

# Name of the environment variable with the address at which rank 0's TCPStore (torch's key-value store) listens. If the
# variable is unset, the store listens at MASTER_ADDR.
BIND = "PACKSADDLE_BIND"


def under_launcher() -> bool:
    """Return True if torchrun, or another launcher that sets RANK and WORLD_SIZE, started this process.
    Raises ConfigError if the launcher's variables are invalid."""
    there = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if len(there) == 1:
        raise ConfigError(
            f"{there[0]} is set, but of RANK and WORLD_SIZE a launcher sets both, and without one neither"
        )
    if not there:
        return False
    size = _variable("WORLD_SIZE", 1, 2**31 - 1)
    _variable("RANK", 0, size - 1)
    _variable("LOCAL_WORLD_SIZE", 1, size, default=1)
    _variable("LOCAL_RANK", 0, size - 1, default=0)
    _variable("MASTER_PORT", 1, 65535, default=1)
    return True


def _variable(name: str, least: int, most: int, default: int | None = None) -> int:
    text = os.environ.get(name) if default is None else os.environ.get(name, str(default))
    if text is None or not text.strip().isascii() or not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ConfigError(f"{name}, which the launcher sets, must be from {least} to {most}, got {shown(text)}")
    return int(text)


def check_interface() -> None:
    """Raise ConfigError if GLOO_SOCKET_IFNAME names a network interface that this machine does not have."""
    named = os.environ.get("GLOO_SOCKET_IFNAME", "")
    there = [name for _, name in socket.if_nameindex()] if hasattr(socket, "if_nameindex") else []
    missing = [name for name in named.split(",") if name and there and name not in there]
    if missing:
        raise ConfigError(f"GLOO_SOCKET_IFNAME names {missing[0]}, and this machine has {', '.join(there)}")


def not_joined(error: Exception) -> str:
    """Return the error message for a failed `init_process_group`: advice, then the first line of `error`."""
    place = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    if "EADDRINUSE" in str(error) or "already in use" in str(error):
        advice = f"{place} is in use; name another port with --master-port (MASTER_PORT)"
    elif isinstance(error, OSError):
        where = os.environ.get(BIND, os.environ.get("MASTER_ADDR"))
        advice = f"this machine cannot listen at {where}; name one of its addresses in {BIND}, or :: for all of them"
    elif "environment variable" in reason:
        advice = "start it with torchrun, which sets the variables"
    elif "joined" in reason or "imed out" in reason:
        advice = f"not every worker connected to {place} in time; check that all were started and can reach it"
    else:
        advice = f"check MASTER_ADDR and MASTER_PORT ({place}) and GLOO_SOCKET_IFNAME"
    return f"the process group cannot be initialized: {advice} ({reason})"


_PAUSE = 0.02
_ROUND = 1.0  # seconds to wait for a confirmation of a proposed key prefix before reading the store again


def agree_on_prefix(store: Any, rank: int, size: int, seconds: float) -> str:
    """Agree with all workers of this launch on a prefix for keys in torch's `store`, and return the prefix; collective.
    Raises RuntimeError if there is no agreement within `seconds`.

    Rank 0 proposes a prefix, and publishes a list of the ids of the workers that answered. Each worker confirms once
    the list contains its own id, so answers from workers of an earlier launch are detected.
    """
    me, deadline = uuid.uuid4().hex, time.monotonic() + seconds
    if rank == 0:
        return _lead(store, me, size, deadline)
    while time.monotonic() < deadline:
        word = _read(store, "packsaddle/word")
        if word:
            store.set(f"packsaddle/{word}/{rank}", me)
            if _wait(lambda word=word: me in _read(store, f"packsaddle/{word}/all").split(",")):  # type: ignore[misc]
                store.set(f"packsaddle/{word}/in/{rank}", me)
                return word
        time.sleep(_PAUSE)
    raise RuntimeError(f"rank {rank} has waited {seconds:g} s for rank 0")


def _lead(store: Any, word: str, size: int, deadline: float) -> str:
    store.set("packsaddle/word", word)
    others = range(1, size)
    while time.monotonic() < deadline:
        names = [_read(store, f"packsaddle/{word}/{rank}") for rank in others]
        if all(names):
            store.set(f"packsaddle/{word}/all", ",".join(names))
            if _wait(lambda names=names: [_read(store, f"packsaddle/{word}/in/{r}") for r in others] == names):  # type: ignore[misc]
                return word
        time.sleep(_PAUSE)
    silent = [str(rank) for rank in others if not _read(store, f"packsaddle/{word}/{rank}")]
    raise RuntimeError(f"no answer from rank {', '.join(silent) or 'any'} at the start")


def _read(store: Any, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _wait(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + _ROUND
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


_asked = threading.Event()


def asked_to_stop() -> bool:
    return _asked.is_set()


@contextmanager
def recording_sigterm() -> Iterator[None]:
    """Context manager that records a SIGTERM; `asked_to_stop` then returns True. A second SIGTERM calls the handler
    that was set before. Use it in the main thread."""
    _asked.clear()
    before = signal.getsignal(signal.SIGTERM)

    def take_note(number: int, frame: FrameType | None) -> None:
        _asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, take_note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# Seconds from a worker's failure until the other workers receive SIGTERM, and from SIGTERM until SIGKILL.
SHUTDOWN_SECONDS = 3.0
ORPHAN_SECONDS = 30.0  # seconds for a worker to save a checkpoint after its launcher was killed
_MOMENT = 2.0  # seconds, enough time for the launcher to receive a worker's result


def in_worker(entry: Callable[..., Any], *args: Any) -> Any:
    """Run entry(*args) in a launched worker and return its result. Before it exits, the worker waits for the launcher's
    report that all workers have returned. After SIGTERM there is no report, so it exits after _MOMENT seconds."""
    threading.Thread(target=_stop_with_launcher, daemon=True).start()
    # All workers are on this machine: use the loopback interface, so that no other machine can connect to them.
    loopback = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
        os.environ.setdefault(variable, loopback[0])
    result = entry(*args)
    if asked_to_stop():
        sys.stdout.flush()
        leave = threading.Timer(_MOMENT, os._exit, (0,))
        leave.daemon = True
        leave.start()
    return result


def _stop_with_launcher() -> None:
    """Wait until the launcher exits. Then send SIGTERM to this process, unless it has received SIGTERM already, and end
    the process ORPHAN_SECONDS later. A launcher exits before its workers only if it was killed."""
    launcher = multiprocessing.parent_process()
    if launcher is not None:
        launcher.join()
        # After a first SIGTERM this worker is already saving a checkpoint, and a second SIGTERM would end it.
        if not asked_to_stop():
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        time.sleep(ORPHAN_SECONDS)
        os._exit(1)


# Torch's loggers that print the traceback of a failed worker. `launch` disables them, since it raises an error that
# contains the traceback.
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")


@contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[Group]:
    """Context manager that initializes torch's default process group from the environment variables of the launcher.
    Its backend is NCCL (xccl on XPU) if every worker has a GPU, and otherwise gloo. A collective raises
    PeerLostError if it takes longer than `timeout`, by default the default timeout of torch.distributed. Raises
    ConfigError if the group cannot be initialized."""
    under_launcher()  # validates the launcher's environment variables
    check_interface()
    local_rank, local_size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    direct = direct_backend(local_size)
    if direct is not None:
        torch.accelerator.set_device_index(local_rank)
    # Even if NCCL exchanges vectors, include gloo to exchange scalars on the CPU, such as metrics and flags.
    try:
        dist.init_process_group(
            "gloo" if direct is None else f"cpu:gloo,{direct}", timeout=timeout, **_store_arguments(timeout)
        )
    except (OSError, RuntimeError, ValueError) as error:  # torch raises RuntimeError for errors of stores and networks
        raise ConfigError(not_joined(error)) from error
    try:
        group = TorchGroup()
        yield group
        with group.naming_lost_workers():
            dist.barrier()  # an early exit would close connections that other workers still use
    finally:
        # Destroy the group, since an interpreter that exits while gloo's threads are alive sometimes aborts.
        dist.destroy_process_group()


def _store_arguments(timeout: timedelta | None) -> dict[str, Any]:
    """Return `store`, `rank` and `world_size` for `init_process_group`, or {} if torch's own store can be used.

    Torch's own store is used under a torchrun that never restarts workers, and if one of the variables RANK,
    WORLD_SIZE, MASTER_ADDR and MASTER_PORT is unset. Under a torchrun that may restart workers, the store is torchrun's
    with a new key prefix. Under all other launchers the store is in rank 0's process. That store listens only at
    MASTER_ADDR or, if the variable named by `BIND` is set, at its value.
    """
    is_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return {}  # init_process_group's own error names the missing variable
    if is_torchrun and os.environ.get("TORCHELASTIC_MAX_RESTARTS") == "0":
        return {}
    rank, size, patience = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), timeout or timedelta(minutes=30)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store: Any
    if rank == 0 and not is_torchrun:
        bind = os.environ.get(BIND, address)
        store = bound_store(bind, port, world_size=size, wait_for_workers=True, timeout=patience)
    else:
        store = dist.TCPStore(address, port, size, False, patience)  # type: ignore[attr-defined]
    if is_torchrun:
        word = agree_on_prefix(store, rank, size, patience.total_seconds())
        store = dist.PrefixStore(f"packsaddle/{word}", store)  # type: ignore[attr-defined]
    return {"store": store, "rank": rank, "world_size": size}


def bound_store(address: str, port: int = 0, **options: Any) -> Any:
    """Return a TCPStore that listens only at `address` and `port`. The address "::" means all addresses of this
    machine, and port 0 means any free port. `options` are further arguments of TCPStore. Raises OSError if the address
    is not one of this machine, or if the port is in use."""
    family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
    listener = socket.create_server(
        (address, port), family=family, backlog=1024, dualstack_ipv6=address == "::" and socket.has_dualstack_ipv6()
    )
    # The store also connects to itself as a client, so it needs an address at which this process reaches it. The store
    # closes the listening socket when it is destroyed.
    here, port = "localhost" if address in ("::", "0.0.0.0") else address, listener.getsockname()[1]
    make: Any = dist.TCPStore  # type: ignore[attr-defined]
    options = {"wait_for_workers": False, "is_master": True, "master_listen_fd": listener.detach()} | options
    # use_libuv=False: a libuv store that is given an open listening socket breaks forks of this process.
    return make(here, port, use_libuv=False, **options)


@contextmanager
def _local_store() -> Iterator[str]:
    """Context manager that yields the path of a file for the rendezvous of torch's launcher. Within the context, the
    store of the rendezvous listens at a single address instead of at all addresses of this machine."""
    from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

    # torch has no option for the address at which the store listens, so replace the method that creates the store. In a
    # version of torch without that method, the store listens at all addresses.
    method = "_create_tcp_store_server"
    exists = hasattr(DynamicRendezvousHandler, method)
    bound = replaced(DynamicRendezvousHandler, method, lambda self, address, port: bound_store(address, port))
    with bound if exists else nullcontext(), tempfile.TemporaryDirectory() as folder:
        yield f"{folder}/rendezvous"


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def preload_workers(module: str) -> None:
    """Preload `module`, torch and the compiled kernels in multiprocessing's forkserver. No-op once the server runs.
    torch._dynamo is preloaded too: the first optimizer of a process imports it, which takes as long as importing torch.
    """
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo", "packsaddle.numerics.kernels.preloaded", module])


@contextmanager
def _restoring_signal_handlers() -> Iterator[None]:
    """Context manager that on exit restores the signal handlers, since torch's launcher replaces them.
    Use it in the main thread."""
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) != handler:
                signal.signal(number, handler)


@contextmanager
def _holding_signals_at_start() -> Iterator[None]:
    """Context manager in which a signal that arrives while torch's launcher starts workers is delayed, until all
    workers are started. Otherwise torch would raise an exception before it has recorded these workers, and so could not
    forward the signal to them."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing import api

    handle = getattr(api, "_terminate_process_handler", None)
    if handle is None:  # this version of torch has no such handler, so signals are not delayed
        yield
        return
    start, starting, held = LocalElasticAgent._start_workers, False, list[int]()

    def hold(number: int, frame: FrameType | None) -> None:
        if starting:
            held.append(number)
        else:
            handle(number, frame)

    def start_all(agent: LocalElasticAgent, group: Any) -> Any:
        nonlocal starting
        starting = True
        try:
            ids = start(agent, group)
        finally:
            starting = False
        if held:
            handle(held[0], None)
        return ids

    with replaced(api, "_terminate_process_handler", hold), replaced(LocalElasticAgent, "_start_workers", start_all):
        yield


def launch(entry: Callable[..., Any], args: tuple[Any, ...], workers: int) -> Any:
    """Run entry(*args) in `workers` processes under torch's launcher and return rank 0's result.

    `entry` must be importable by name; it is called with the launcher's environment variables (see `process_group`).
    Raises ConfigError if a worker raised a ConfigError, WorkerFailedError if a worker failed otherwise, and
    TerminatedError on SIGTERM.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    check_interface()
    preload_workers(entry.__module__)
    # Divide all cores among the workers; torchrun would give each worker one thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # If the launcher receives a signal, `elastic_launch` raises SignalException, after the workers have ended.
    try:
        with ExitStack() as stack:
            for name in _LOGGERS:
                stack.enter_context(replaced(logging.getLogger(name), "disabled", True))
            # After a worker failed, torch waits 30 s for the other workers to react to SIGTERM, and it has no setting
            # for that time. LaunchConfig's shutdown_timeout is the time for workers to save a checkpoint after a signal
            # to the launcher, and stays at 30 s.
            join = partialmethod(ProcessContext.join, grace_period=SHUTDOWN_SECONDS)
            stack.enter_context(replaced(ProcessContext, "join", join))
            stack.enter_context(_restoring_signal_handlers())
            stack.enter_context(_holding_signals_at_start())
            file = stack.enter_context(_local_store())
            # All workers are on one machine, and the operating system chooses the port. Workers are not restarted: the
            # launch ends if a worker fails.
            config = LaunchConfig(
                min_nodes=1,
                max_nodes=1,
                nproc_per_node=workers,
                run_id=uuid.uuid4().hex,
                rdzv_backend="c10d",
                rdzv_endpoint=file,
                rdzv_configs={"store_type": "file"},
                local_addr="localhost",
                max_restarts=0,
                start_method="forkserver",  # torch is imported once, in a server that forks every worker
                monitor_interval=0.1,
            )
            return elastic_launch(config, in_worker)(entry, *args)[0]
    except ChildFailedError as error:
        raise failure_of(*error.get_first_failure()) from error
    except SignalException as stop:
        raise (TerminatedError if stop.sigval == signal.SIGTERM else KeyboardInterrupt) from None
