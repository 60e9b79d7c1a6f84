"""A study's runs, several at once, each in a process of its own, with progress and the time left."""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from packsaddle.comm.launch import import_once
from packsaddle.errors import ConfigError
from packsaddle.experiments.folder_lock import check_free
from packsaddle.experiments.job import How, Job, can_be_fused
from packsaddle.experiments.progress import StudyProgress
from packsaddle.experiments.reproduce.study import Study, StudyFolder, SubRun
from packsaddle.experiments.run_checkpoints import CheckpointPolicy, LoadingError
from packsaddle.experiments.run_folder import make_new

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
    import_once(__name__)
    context = multiprocessing.get_context("forkserver")
    # Not by how much there is to do: sums over threads differ in rounding, and a run must be the same every time.
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(threads,))
    try:
        yield pool
    except BaseException:  # Ctrl-C, a caller that stops, or a failure
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _begin(threads: int) -> None:
    """In a new process: share the cores, leave Ctrl-C to the parent, and end with it, however that ends."""
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
    except Exception as failure:
        raise RuntimeError(f"{item} failed: {failure}") from failure


@dataclass(frozen=True)
class Means:
    """Where the data are and how runs are done."""

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
    how: How = "processes" if means.processes else "fused" if can_be_fused(sub_run.config) else "serial"
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
