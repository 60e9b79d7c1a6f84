"""Execution of a study's runs: several run concurrently, each in its own process, with progress and the time left."""

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
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL to a process


def default_jobs() -> int:
    """Return the default number of concurrent runs: one per core, or a single one on a GPU."""
    return 1 if torch.cuda.is_available() else os.cpu_count() or 1


def in_parallel(
    work: Callable[[Item], Result], items: Sequence[Item], jobs: int, look: Callable[[Collection[Item]], None]
) -> Iterator[tuple[Item, Result]]:
    """Call work(item) for all items in `jobs` processes; yield each item and its result as soon as it is finished.

    `look` is called every second with the items in progress. `work` must be importable by name. Raises ConfigError,
    GuardError, WorkerFailedError (also for a killed process) or RuntimeError when the first item fails; the error names
    the item. After a failure, and if the caller stops iterating, the running processes are ended.
    """
    context = multiprocessing.get_context("forkserver")
    doing: Sequence[int] = context.RawArray("q", len(items))  # id of the process that works on each item; 0: none
    with _pool(context, jobs, doing) as pool:
        with _deaf_to_interrupts():  # the pool starts its processes at the first submission
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
                    pool.shutdown()  # waits until all processes have ended and have exit codes
                    raise WorkerFailedError(_lost(items, doing, processes)) from None
                yield futures[future], result


_doing: Any = None  # shared array in which a process of the pool writes its id at the index of its current item


def _do_item(work: Callable[[Item], Result], item: Item, place: int) -> Result:
    _doing[place] = os.getpid()
    try:
        return work(item)
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
    return f"{', '.join(str(items[i]) for i in at) or 'a run'} failed: its process {how}{memory}"


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
def _pool(context: ForkServerContext, jobs: int, doing: Sequence[int]) -> Iterator[ProcessPoolExecutor]:
    preload_workers(__name__)
    # The number of threads does not depend on the number of runs left: sums over threads differ in rounding, and a
    # repeated run must be bitwise identical.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads, doing))
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


def _begin(threads: int, doing: Sequence[int]) -> None:
    """Initialize a process of the pool: set its number of threads, and ignore Ctrl-C.

    The process exits when its parent has ended, even if the parent was killed.
    """
    global _doing
    _doing = doing
    # Ctrl-C is also ignored here since the fork server may have been started before `_deaf_to_interrupts`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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
    """The data folder of a study, and how its runs are executed."""

    data_dir: Path | None
    download: bool = False
    jobs: int | None = None  # number of concurrent runs; None: one per core, or one on a GPU
    processes: bool = False  # True: workers are processes; False: they are simulated


def run_study(study: Study, folder: StudyFolder, means: Means) -> None:
    """Do the runs of a study that are not finished, with progress on the terminal."""
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
    """Raise ConfigError for input that would make a run fail, before the study starts.

    One run of each setting is constructed.
    """
    first = {sub_run.setting: sub_run.config for sub_run in reversed(sub_runs)}
    for config in first.values():
        Job((config,), (), means.data_dir, means.download).check(config.workers)


def _do(sub_run: SubRun, folder: StudyFolder, means: Means) -> None:
    """Do one run of a study. An interrupted run continues from its last checkpoint."""
    path = folder.run(sub_run)
    check_free(path)  # a process of a killed study may use the folder for another moment
    how: How = "processes" if means.processes else fastest_simulation(sub_run.config)
    saving = CheckpointPolicy(resume=folder.is_begun(sub_run), stops=False)
    job = Job((sub_run.config,), (path,), means.data_dir, means.download, quiet=True, saving=saving)
    if saving.resume:
        try:
            job.run(sub_run.config.workers, how)
            return
        except LoadingError:  # the checkpoint cannot be restored, so the run starts again
            job = replace(job, saving=replace(saving, resume=False))
    shutil.rmtree(path, ignore_errors=True)
    make_new(path)
    job.run(sub_run.config.workers, how)
