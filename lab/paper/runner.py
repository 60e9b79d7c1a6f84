"""Execution of a study's runs: several run concurrently, each in its own process."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from lab.paper.study import Study, StudyFolder, SubRun
from lab.pool import Report, in_parallel
from lab.runs import CheckpointPolicy, How, Job, LoadingError, check_free, fastest_simulation, make_new


@dataclass(frozen=True)
class Means:
    """The data folder of a study, and how its runs are executed."""

    data_dir: Path | None
    download: bool = False
    jobs: int | None = None  # number of concurrent runs; None: one per core, or one on a GPU
    processes: bool = False  # True: workers are processes; False: they are simulated


def run_study(study: Study, folder: StudyFolder, means: Means) -> None:
    """Do the runs of a study that are not finished, with progress on the terminal."""
    missing = folder.missing(study.sub_runs())
    for _ in in_parallel(partial(_do, folder=folder, means=means), missing, study.name, means.jobs):
        pass


def check_study(sub_runs: Sequence[SubRun], means: Means) -> None:
    """Raise ConfigError for input that would make a run fail, before the study starts.

    One run of each setting is constructed.
    """
    first = {sub_run.setting: sub_run.config for sub_run in reversed(sub_runs)}
    for config in first.values():
        Job((config,), (), means.data_dir, means.download).check(config.workers)


def _do(sub_run: SubRun, report: Report, folder: StudyFolder, means: Means) -> None:
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
