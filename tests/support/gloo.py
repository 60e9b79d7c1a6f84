"""Gloo worker processes for tests: a pool that serves call after call, each in a process group of its own.

To start a process, and to import torch's parts and a test module in it, takes longer than most calls. So the workers of
a pytest process stay; a call that fails, hangs, or leaves something that cannot be undone (leftovers.py) ends them,
and the next call gets new ones.
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
_GRACE = 5.0  # seconds for the others to say what they make of a worker that failed
_KEPT = 4  # workers at most that stay
# Clean children that do not import torch again, whatever threads the test process has by now.
_CONTEXT = multiprocessing.get_context("forkserver")
# The first optimizer of a process imports torch._dynamo, which takes as long as torch; so does numba's first loop. The
# processes that commands start in tests are of this server too.
_CONTEXT.set_forkserver_preload(
    ["torch", "torch._dynamo", "packsaddle.numerics.kernels.preloaded", "lab.runs.job", "pytest"]
)


def run_in_processes(
    fn: Callable[..., Any], workers: int, folder: Path, *args: Any, timeout: float = _TIMEOUT, fresh: bool = False
) -> list[Any]:
    """Run fn(*args) in `workers` gloo processes; fn must be importable. Returns the results by rank.

    fresh=True: in processes that have run nothing before and end afterwards, for what leaves traces that leftovers.py
    does not know (a patched torch, an extension loaded).
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
    """Workers by rank, each with the connection to it."""

    def __init__(self, *, reusable: bool = True) -> None:
        self._members: list[tuple[Any, Connection]] = []
        self._reusable = reusable  # False: the workers serve one call
        self._calls = count()

    @property
    def usable(self) -> bool:
        return all(process.is_alive() for process, _ in self._members)

    def grow(self, workers: int) -> None:
        """Start the workers that there are not yet."""
        while len(self._members) < workers:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_serve, args=(theirs, self._reusable), daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is the end of the connection
            self._members.append((process, ours))

    def run(
        self, fn: Callable[..., Any], args: tuple[Any, ...], workers: int, folder: Path, timeout: float
    ) -> tuple[list[Any], bool]:
        """Make one call. Returns the results, and whether the workers are as good as new ones."""
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
    """Return the pool of this process; without the workers that it had if one of them died between calls."""
    if not _pool.usable:
        _pool.end()
    return _pool


def _serve(connection: Connection, reusable: bool) -> None:
    """Make the calls that come, until the other side ends or one of them fails; if `reusable`, without a trace."""
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
            # As bytes: torch would share tensors through a worker that may be about to exit.
            result = pickle.dumps(fn(*args))
            dist.barrier()
            del fn, args
            leftovers.forget_tests()
            gc.collect()  # models and hooks go before their process group
            dist.destroy_process_group()
            left = before.restore() if reusable else []
            outcome = result, "", left
        except BaseException:
            connection.send((b"", traceback.format_exc(), []))
            return  # without a group: the others' exchanges with this worker end
        connection.send(outcome)
