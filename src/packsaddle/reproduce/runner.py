"""Doing a study's runs, with progress and the time left."""

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from packsaddle.experiment import How, Job, can_be_fused
from packsaddle.folderlock import check_free
from packsaddle.keeping import LoadingError
from packsaddle.progress import StudyProgress
from packsaddle.reproduce.pool import default_jobs, in_parallel
from packsaddle.reproduce.study import Study, StudyFolder, SubRun
from packsaddle.runfolder import make_new
from packsaddle.saving import Saving


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
    saving = Saving(resume=folder.is_begun(sub_run), stops=False)
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
