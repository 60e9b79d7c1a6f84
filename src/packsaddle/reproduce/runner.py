"""Doing a study's runs: several at once, each in a process of its own, with progress and the time left."""

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from packsaddle.experiment import How, Job
from packsaddle.progress import StudyProgress
from packsaddle.reproduce.study import Study, StudyFolder, SubRun
from packsaddle.runfolder import make_new
from packsaddle.schema import ConfigError

_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Means:
    """Where the data are and how runs are done."""

    data_dir: Path | None
    download: bool = False
    jobs: int | None = None  # runs at once; None: one per core, but one on a GPU
    processes: bool = False  # real worker processes instead of a simulation


def run_study(study: Study, folder: StudyFolder, means: Means) -> None:
    """Do the runs that are missing. Raises ConfigError for what would stop one of them before any is started."""
    missing = folder.missing(study.sub_runs())
    if not missing:
        return
    _check(missing, means)
    jobs = means.jobs or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    with _pool(min(jobs, len(missing))) as pool, StudyProgress(study.name, len(study.sub_runs())) as progress:
        futures = {pool.submit(_do, run, folder.run(run), means): run for run in missing}
        todo = set(futures)
        while todo:
            done, todo = wait(todo, timeout=_LOOK_SECONDS, return_when=FIRST_COMPLETED)
            _raise_first(done, futures)
            shares = {run.name: folder.progress(run) for run in study.sub_runs()}
            progress.show(shares, {run.name for f, run in futures.items() if f.running() and shares[run.name] < 1})


def _check(missing: Sequence[SubRun], means: Means) -> None:
    """One construction per setting, in this process, so that mistakes are found before hours are spent."""
    first = {sub_run.setting: sub_run.config for sub_run in reversed(missing)}
    for config in first.values():
        Job((config,), (), means.data_dir, means.download).check(config.workers)


@contextmanager
def _pool(jobs: int) -> Iterator[ProcessPoolExecutor]:
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // jobs)
    pool = ProcessPoolExecutor(jobs, mp_context=context, initializer=_begin, initargs=(os.getpid(), threads))
    try:
        yield pool
    except BaseException:  # Ctrl-C, or a run that failed: what is under way is abandoned, to be begun again
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


def _do(sub_run: SubRun, path: Path, means: Means) -> None:
    """One run, from its start; what a run that was cut off left in its folder is given up."""
    shutil.rmtree(path, ignore_errors=True)
    make_new(path)
    how: How = "processes" if means.processes else "serial"
    Job((sub_run.config,), (path,), means.data_dir, means.download, quiet=True).run(sub_run.config.workers, how)


def _raise_first(done: set[Future[None]], futures: dict[Future[None], SubRun]) -> None:
    for future in done:
        if (failure := future.exception()) is not None:
            if isinstance(failure, ConfigError):
                raise ConfigError(f"{futures[future].name}: {failure}") from failure
            raise RuntimeError(f"run {futures[future].name} failed: {failure}") from failure
