"""Gloo worker processes for tests: a pool that serves one call after the other, each in its own process group.

Starting a process, and importing torch's parts and a test module in it, takes longer than most calls. So the workers of
a pytest process are reused. A call that fails, hangs, or changes global state that cannot be restored (leftovers.py)
ends them, and the next call gets new workers.
"""

import atexit
import gc
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import leftovers
import torch
import torch.distributed as dist

_TIMEOUT = 120.0
_GRACE = 5.0  # seconds for the remaining workers to report their errors after one worker has failed
_KEPT = 4  # maximum number of workers that are reused
# A fork server starts clean processes that need not import torch again, even if the test process has threads.
_CONTEXT = multiprocessing.get_context("forkserver")
# Import torch._dynamo and numba in the server: the first optimizer of a process imports the former, which takes as long
# as importing torch, and the first loop the latter. Processes that commands start in tests come from this server too.
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "packsaddle.numerics.kernels.preloaded", "packsaddle.cli", "pytest"]
)


def run_in_processes(
    fn: Callable[..., Any], workers: int, folder: Path, *args: Any, timeout: float = _TIMEOUT, fresh: bool = False
) -> list[Any]:
    """Run fn(*args) in `workers` gloo processes, and return the results by rank. fn must be importable.

    With `fresh` the processes are new and end afterwards. This is for functions that change state which leftovers.py
    does not restore, such as a patched torch or a loaded extension.
    """
    own = fresh or workers > _KEPT
    pool = _Pool(reusable=False) if own else _kept()
    reusable = False
    try:
        pool.grow(workers)
        results, reusable = pool.run(fn, args, workers, folder, timeout)
    finally:
        if own or not reusable:
            pool.end()
    return results


class _Pool:
    """The worker processes, in the order of their ranks, with the connections to them."""

    def __init__(self, *, reusable: bool = True) -> None:
        self._members: list[tuple[Any, Connection]] = []
        self._reusable = reusable  # False: the workers serve one call
        self._calls = count()

    @property
    def usable(self) -> bool:
        return all(process.is_alive() for process, _ in self._members)

    def grow(self, workers: int) -> None:
        """Start workers until there are at least `workers`."""
        while len(self._members) < workers:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, self._reusable), daemon=True)
            process.start()
            theirs.close()  # closed here, so that the connection ends when the worker dies
            self._members.append((process, ours))

    def run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], workers: int, folder: Path, timeout: float
    ) -> tuple[list[Any], bool]:
        """Make one call. Returns the results by rank, and True if the workers can be reused."""
        members = self._members[:workers]
        store, call = str(folder / f"store-{next(self._calls)}"), pickle.dumps((fn, args))
        for rank, (_, connection) in enumerate(members):
            connection.send((sys.path, str(Path.cwd()), store, rank, workers, call))
        waiting = {connection: rank for rank, (_, connection) in enumerate(members)}
        results: dict[int, Any] = {}
        errors, reusable, deadline = [], True, time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for connection in ready:
                rank = waiting.pop(connection)  # type: ignore[arg-type]
                try:
                    result, error, left = connection.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionError):
                    members[rank][0].join(timeout=10)
                    result, left = b"", []
                    error = f"worker {rank} died with exit code {members[rank][0].exitcode}"
                if error:
                    errors.append(error)
                    deadline = min(deadline, time.monotonic() + _GRACE)
                else:
                    results[rank] = pickle.loads(result)
                    reusable = reusable and not left
        if errors:
            raise AssertionError("a worker failed:\n" + "\n".join(errors))
        if waiting:
            raise AssertionError(f"workers {sorted(waiting.values())} have given no result within {timeout:g} s")
        return [results[rank] for rank in range(workers)], reusable

    def end(self) -> None:
        """Kill the workers; the pool can grow again."""
        for process, connection in self._members:
            connection.close()
            process.kill()
            process.join(timeout=10)
        self._members = []


_pool = _Pool()
atexit.register(_pool.end)


def _kept() -> _Pool:
    """Return the pool of this process. If a worker has died since the last call, the pool's workers are ended."""
    if not _pool.usable:
        _pool.end()
    return _pool


def _serve(connection: Connection, reusable: bool) -> None:
    """Make the calls received through a connection, until the connection ends or a call fails.

    With `reusable` the global state is restored after each call.
    """
    torch.set_num_threads(1)
    while True:
        try:
            path, folder, store, rank, workers, call = connection.recv()
        except EOFError:
            return
        sys.path[:] = path
        os.chdir(folder)
        try:
            fn, args = pickle.loads(call)
            before = leftovers.State()
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
            # Send the result as bytes: torch would share tensors' memory with this worker, which may exit soon.
            result = pickle.dumps(fn(*args))
            dist.barrier()
            del fn, args
            leftovers.forget_tests()
            gc.collect()  # delete models and hooks before their process group is destroyed
            dist.destroy_process_group()
            left = before.restore() if reusable else []
            outcome = result, "", left
        except BaseException:
            connection.send((b"", traceback.format_exc(), []))
            return  # exiting closes the process group, so that exchanges of other workers with this one fail
        connection.send(outcome)
