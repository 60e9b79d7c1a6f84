"""Many trainings at once, each in a process of its own, under one progress bar."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from packsaddle.comm import WorkerFailedError, preload_workers
from packsaddle.errors import ConfigError, GuardError
from packsaddle.messages import printable

Item = TypeVar("Item")
Result = TypeVar("Result")
Report = Callable[[float], None]  # called by a training with the fraction of it that is done
_LOOK_SECONDS = 0.25
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL to a process


def default_jobs() -> int:
    """Return the default number of concurrent trainings: one per core, or a single one on a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def in_parallel(
    work: Callable[[Item, Report], Result], items: Sequence[Item], label: str, jobs: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Call work(item, report) for all items in `jobs` processes; yield each item and its result when it is finished.

    `work` must be importable by name. Raises ConfigError, GuardError, WorkerFailedError (also for a killed process) or
    RuntimeError when the first item fails; the error names the item. After a failure, and if the caller stops
    iterating, the running processes are ended.
    """
    if not items:
        return
    context, jobs = multiprocessing.get_context("forkserver"), jobs or default_jobs()
    # Shared arrays: the fraction of each item that is done, and the id of the process that works on it (0: none).
    done, doing = context.RawArray("d", len(items)), context.RawArray("q", len(items))
    with _Bar(label, len(items)) as bar, _pool(context, jobs, done, doing) as pool:
        with _deaf_to_interrupts():  # the pool starts its processes at the first submission
            futures = {pool.submit(_do_item, work, item, i): item for i, item in enumerate(items)}
            processes = list(pool._processes.values())
        todo = set(futures)
        while todo:
            finished, todo = wait(todo, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            bar.show(done, len(items) - len(todo), [str(futures[f]) for f in todo if f.running()])
            for future in finished:
                item = futures[future]
                try:
                    result = future.result()
                except BrokenProcessPool:
                    pool.shutdown()  # waits until all processes have ended and have exit codes
                    raise WorkerFailedError(_lost(items, doing, processes)) from None
                except WorkerFailedError as failure:
                    raise WorkerFailedError(f"{item}: {failure}", failure.trace) from failure
                except (ConfigError, GuardError) as failure:
                    kind = ConfigError if isinstance(failure, ConfigError) else GuardError
                    raise kind(f"{item}: {failure}") from failure
                except Exception as failure:
                    raise RuntimeError(f"{item} failed: {failure}") from failure
                yield item, result


class _Bar:
    """One bar for all trainings, with the time left. Other outputs than a terminal get a line every tenth."""

    def __init__(self, label: str, count: int) -> None:
        self._label, self._count, self._begin, self._tenths = printable(label), count, time.monotonic(), 0
        self._console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bar = Progress(*columns, console=self._console, disable=not self._console.is_terminal, transient=True)

    def __enter__(self) -> "_Bar":
        self._bar.start()
        self._task = self._bar.add_task(escape(self._label), total=self._count, text="starting")
        return self

    def __exit__(self, *failure: object) -> None:
        self._bar.stop()

    def show(self, fractions: Sequence[float], finished: int, running: Sequence[str]) -> None:
        done = min(sum(fractions), self._count)
        text = f"{finished} of {self._count}"
        if 0.02 * self._count < done < self._count:  # earlier the pace is unknown
            seconds = (time.monotonic() - self._begin) * (self._count - done) / done
            text += f", about {seconds / 60:.0f} min left" if seconds >= 60 else f", about {seconds:.0f} s left"
        shown = escape(printable(f"{text}  {', '.join(running)}"))
        self._bar.update(self._task, completed=done, text=shown)
        tenths = int(10 * done / self._count)
        if not self._console.is_terminal and tenths > self._tenths:
            self._tenths = tenths
            line = f"{self._label}: {10 * tenths:3d}%  {text}"
            self._console.print(line, highlight=False, soft_wrap=True, markup=False)


_done: Any = None  # the two shared arrays, in a process of the pool
_doing: Any = None


def _do_item(work: Callable[[Item, Report], Result], item: Item, place: int) -> Result:
    def report(fraction: float) -> None:
        _done[place] = fraction

    _doing[place] = os.getpid()
    try:
        result = work(item, report)
        report(1.0)
        return result
    finally:
        _doing[place] = 0


def _lost(items: Sequence[object], doing: Sequence[int], processes: Sequence[BaseProcess]) -> str:
    """Return an error message that names the item whose process has died, and the signal or exit code.

    It names all running items if the process is unknown. Exits by SIGTERM are ignored, since the executor ends the
    remaining processes by it.
    """
    died = {p.pid: p.exitcode for p in processes if p.exitcode not in (None, 0, -signal.SIGTERM)}
    at = [i for i, pid in enumerate(doing) if pid in died] or [i for i, pid in enumerate(doing) if pid]
    code = next(iter(died.values()), None)
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = "ended" if code is None else f"ended with exit code {code}"
    memory = "; out of memory? choose fewer --jobs" if code == -signal.SIGKILL else ""
    return f"{', '.join(str(items[i]) for i in at) or 'a training'} failed: its process {how}{memory}"


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Make processes that are started in this context ignore Ctrl-C; the parent process ends them instead."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _pool(context: ForkServerContext, jobs: int, done: Any, doing: Any) -> Iterator[ProcessPoolExecutor]:
    preload_workers(__name__)
    # The number of threads does not depend on the number of items left: sums over threads differ in rounding, and a
    # repeated training must be bitwise identical.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads, done, doing))
    try:
        yield pool
    except BaseException:  # also Ctrl-C, and a caller that stops iterating
        processes = list((pool._processes or {}).values())
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_GRACE)
            process.kill()  # a process that ignored SIGTERM would wait forever for more work
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _begin(threads: int, done: Any, doing: Any) -> None:
    """Initialize a process of the pool: set its number of threads, and ignore Ctrl-C.

    The process exits when its parent has ended, even if the parent was killed.
    """
    global _done, _doing
    _done, _doing = done, doing
    # Ctrl-C is also ignored here since the fork server may have been started before `_deaf_to_interrupts`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
