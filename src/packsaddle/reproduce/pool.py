"""Independent pieces of work, several at once, each in a process of its own."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from packsaddle.schema import ConfigError

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 1.0


def default_jobs() -> int:
    """One per core, and one at a time on a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, look: Callable[[Collection[Item]], None]
) -> Iterator[tuple[Item, Result]]:
    """Yield items with work(item) as they get done; `look` is called every second with those under way.

    `work` must be importable by name. Raises ConfigError or RuntimeError, naming the item, when the first one fails;
    what is under way then, or when the caller stops, is ended.
    """
    with _pool(jobs) as pool:
        with _deaf_to_interrupts():  # processes are started at the first submission
            futures = {pool.submit(work, item): item for item in items}
        todo = set(futures)
        while todo:
            done, todo = wait(todo, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            look([futures[future] for future in todo if future.running()])
            for future in done:
                yield futures[future], _result(future, futures[future])


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Processes started within do not hear Ctrl-C: the parent does, and ends them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    # Not by how much there is to do: sums over threads differ in rounding, and a run must be the same every time.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(os.getpid(), threads))
    try:
        yield pool
    except BaseException:  # Ctrl-C, a caller that stops, or a failure
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _begin(parent: int, threads: int) -> None:
    """In a new process: share the cores, and end with the parent, however that ends."""
    torch.set_num_threads(threads)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(future: Future[Result], item: object) -> Result:
    try:
        return future.result()
    except ConfigError as failure:
        raise ConfigError(f"{item}: {failure}") from failure
    except Exception as failure:
        raise RuntimeError(f"{item} failed: {failure}") from failure
