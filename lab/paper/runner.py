"""A study's runs, several at once, each in a process of its own, with progress and the time left."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from lab.paper.progress import StudyProgress
from lab.paper.study import Study, StudyFolder, SubRun
from lab.runs import CheckpointPolicy, How, Job, LoadingError, check_free, fastest_simulation, make_new
from packsaddle.comm import WorkerFailedError, preload_workers
from packsaddle.errors import ConfigError, GuardError

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOOK_SECONDS = 1.0
_GRACE = 5.0  # seconds that a process has for its end


def default_jobs() -> int:
    """One per core, and one at a time on a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, look: Callable[[Collection[Item]], None]
) -> Iterator[tuple[Item, Result]]:
    """Yield items with work(item) as they get done; `look` is called every second with the running ones.

    `work` must be importable by name. Raises ConfigError, GuardError, WorkerFailedError (for a killed process, too)
    or RuntimeError, naming the item, when the first one fails; what is running then, or when the caller stops, is
    ended.
    """
    context = multiprocessing.get_context("forkserver")
    doing: Sequence[int] = context.RawArray("q", len(items))  # the process that each item is with, or 0
    with _pool(context, jobs, doing) as pool:
        with _deaf_to_interrupts():  # processes are started at the first submission
            futures = {pool.submit(_do_item, work, item, i): item for i, item in enumerate(items)}
            processes = list(pool._processes.values())
        todo = set(futures)
        while todo:
            done, todo = wait(todo, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            look([futures[future] for future in todo if future.running()])
            for future in done:
                try:
                    result = _result(future, futures[future])
                except BrokenProcessPool:
                    pool.shutdown()  # then all have ended, and have exit codes
                    raise WorkerFailedError(_lost(items, doing, processes)) from None
                yield futures[future], result


_doing: Any = None  # in a process of a pool: where it says what it is at


def _do_item(work: Callable[[Item], Result], item: Item, place: int) -> Result:
    _doing[place] = os.getpid()
    try:
        return work(item)
    finally:
        _doing[place] = 0


def _lost(items: Sequence[object], doing: Sequence[int], processes: Sequence[BaseProcess]) -> str:
    """Say which item's process has died, and of what; all that were running, if that is unknown.

    The executor ends the other processes by SIGTERM.
    """
    died = {p.pid: p.exitcode for p in processes if p.exitcode not in (None, 0, -signal.SIGTERM)}
    at = [i for i, pid in enumerate(doing) if pid in died] or [i for i, pid in enumerate(doing) if pid]
    code = next(iter(died.values()), None)
    if code is not None and code < 0:
        how = f"was killed by {signal.Signals(-code).name}"
    else:
        how = "ended" if code is None else f"ended with exit code {code}"
    memory = "; out of memory? choose fewer --jobs" if code == -signal.SIGKILL else ""
    return f"{', '.join(str(items[i]) for i in at) or 'a run'} failed: its process {how}{memory}"


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
def _pool(context: ForkServerContext, jobs: int, doing: Sequence[int]) -> Iterator[ProcessPoolExecutor]:
    preload_workers(__name__)
    # Not by how much there is to do: sums over threads differ in rounding, and a run must be the same every time.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads, doing))
    try:
        yield pool
    except BaseException:  # Ctrl-C, a caller that stops, or a failure
        processes = list((pool._processes or {}).values())
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(_GRACE)
            process.kill()  # what has handled the signal would wait for work that does not come
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _begin(threads: int, doing: Sequence[int]) -> None:
    """In a new process: share the cores, leave Ctrl-C to the parent, and end with it, however that ends."""
    global _doing
    _doing = doing
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the server of processes may have been started before
    torch.set_num_threads(threads)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _result(future: Future[Result], item: object) -> Result:
    try:
        return future.result()
    except ConfigError as failure:
        raise ConfigError(f"{item}: {failure}") from failure
    except BrokenProcessPool:
        raise
    except GuardError as failure:
        raise GuardError(f"{item}: {failure}") from failure
    except WorkerFailedError as failure:
        raise WorkerFailedError(f"{item}: {failure}", failure.trace) from failure
    except Exception as failure:
        raise RuntimeError(f"{item} failed: {failure}") from failure


@dataclass(frozen=True)
class Means:
    """The folder of the data, and the way to run."""

    data_dir: Path | None
    download: bool = False
    jobs: int | None = None  # runs at once; None: one per core, but one on a GPU
    processes: bool = False  # real worker processes instead of a simulation


def run_study(study: Study, folder: StudyFolder, means: Means) -> None:
    """Do the runs that are missing."""
    runs = study.sub_runs()
    missing = folder.missing(runs)
    if not missing:
        return
    with StudyProgress(study.name, len(runs)) as progress:

        def look(active: Collection[SubRun]) -> None:
            shares = {run.name: folder.progress(run) for run in runs}
            progress.show(shares, {run.name for run in active if shares[run.name] < 1})

        for _ in in_parallel(partial(_do, folder=folder, means=means), missing, means.jobs or default_jobs(), look):
            pass
        look(())


def check_study(sub_runs: Sequence[SubRun], means: Means) -> None:
    """Raise ConfigError for what would stop a run: one is constructed per setting, before hours are spent."""
    first = {sub_run.setting: sub_run.config for sub_run in reversed(sub_runs)}
    for config in first.values():
        Job((config,), (), means.data_dir, means.download).check(config.workers)


def _do(sub_run: SubRun, folder: StudyFolder, means: Means) -> None:
    """One run, from its last checkpoint if it was cut off, else from its start."""
    path = folder.run(sub_run)
    check_free(path)  # by what a study that was killed has left, for a moment
    how: How = "processes" if means.processes else fastest_simulation(sub_run.config)
    saving = CheckpointPolicy(resume=folder.is_begun(sub_run), stops=False)
    job = Job((sub_run.config,), (path,), means.data_dir, means.download, quiet=True, saving=saving)
    if saving.resume:
        try:
            job.run(sub_run.config.workers, how)
            return
        except LoadingError:  # what it has left cannot be used
            job = replace(job, saving=replace(saving, resume=False))
    shutil.rmtree(path, ignore_errors=True)
    make_new(path)
    job.run(sub_run.config.workers, how)
