"""packsaddle reproduce."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from packsaddle.commands.console import dated, print_runs
from packsaddle.runfolder import read_runs


def reproduce(
    what: Annotated[Literal["fig2"], tyro.conf.Positional],
    scale: Literal["paper", "cpu", "smoke"] = "cpu",
    data_dir: Path | None = None,
    download: bool = False,
    out: Path | None = None,
    resume: bool = False,
    jobs: int | None = None,
    processes: bool = False,
    seeds: int | None = None,
    only: tuple[str, ...] = (),
    set: tuple[str, ...] = (),
) -> None:
    """Make the paper's figures and table from real data.

    Args:
        what: What to reproduce.
        scale: paper: the paper's setting; cpu: the largest that two cores do in about 90 minutes; smoke: a minute.
        data_dir: Folder of the dataset.
        download: Fetch the dataset into --data-dir if it is not there.
        out: A new folder for the runs and what is made of them; by default one under runs/ named by the time.
        resume: Go on in a folder that was begun: finished runs are kept, the others are done from their start.
        jobs: Runs at once; by default one per core, on a GPU one.
        processes: Real worker processes instead of simulated workers.
        seeds: Seeds per setting instead of the scale's.
        only: Settings to run, by their folders' names; by default all.
        set: Overrides of every configuration, key=value by dotted key.
    """
    from packsaddle.reproduce import figure2
    from packsaddle.reproduce.runner import Means, run_study
    from packsaddle.reproduce.study import StudyFolder

    study = figure2.study(scale).changed(set, seeds, only)
    folder = StudyFolder(out or dated(what))
    folder.open(study, resume=resume)
    run_study(study, folder, Means(data_dir, download, jobs, processes))
    print_runs(read_runs([folder.run(sub_run) for sub_run in study.sub_runs()]))
