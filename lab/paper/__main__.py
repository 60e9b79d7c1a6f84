"""python -m lab.paper."""

from pathlib import Path
from typing import Literal

from rich.table import Table

from lab.cli.console import dated, require_plots
from lab.paper import drawing
from lab.paper.results import print_settings, save_figure, summarise, write_results
from lab.paper.runner import Means, check_study, run_study
from lab.paper.studies import REPRODUCTIONS
from lab.paper.study import Data, Scale, Study, StudyFolder
from lab.paper.table1 import tabulate
from lab.runs import check_free, locked, read_runs
from lab.runs.report import read_curves, settings, write_report
from packsaddle import __version__
from packsaddle.cli import print_table, serve
from packsaddle.errors import ConfigError

PROGRAM = "python -m lab.paper"

Figure1 = Literal["fig1", "fig1-norms", "fig1-compressors"]
Figure2 = Literal["fig2", "fig2-open", "fig2-compressors", "fig2-k", "fig2-escape"]
Text = Literal["text", "text-variants"]
What = Literal[Figure1, Figure2, Text, "table1"]


def data_of(what: str, data_dir: Path | None) -> Data:
    """Return the name of a study's data set. Figure 1 uses --data-dir if it is an image folder, otherwise CIFAR-10."""
    if not what.startswith("fig1"):
        return "text" if what.startswith("text") else "mnist"
    return "folder" if data_dir is not None and (data_dir / "train").is_dir() else "cifar10"


def reproduce(
    what: What,
    /,
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

    Examples:
        python -m lab.paper fig2 --data-dir MNIST --download
        python -m lab.paper fig1 --scale smoke --data-dir CIFAR10 --seeds 1 --out runs/fig1
        python -m lab.paper table1 --scale smoke

    Args:
        what: The paper's fig1, fig2 or table1, or another study (experiments/README.md has their questions).
        scale: paper: the paper's setting; cpu: the largest that two cores do in about 90 minutes; smoke: a minute.
        data_dir: Folder of the dataset: MNIST or CIFAR-10 as torchvision keeps them, or an image folder.
        download: Fetch the dataset into --data-dir if it is not there.
        out: A new folder for the runs and what is made of them; by default one under runs/ named by the time.
        resume: Go on in a folder that was begun: finished runs are kept, others go on from their checkpoints.
        jobs: Runs at once; by default one per core, on a GPU one.
        processes: Real worker processes instead of simulated workers.
        seeds: How many seeds per setting, instead of the scale's.
        only: Settings to run, by their folders' names; by default all.
        set: Overrides of every configuration, key=value by dotted key.
    """
    require_plots(f"{PROGRAM} {what}")
    if jobs is not None and jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, got {jobs}")
    if resume and out is None:
        raise ConfigError("--resume needs --out, the folder of the study to continue")
    if what == "table1":
        given: dict[str, object] = {"data_dir": data_dir, "download": download, "processes": processes}
        given |= {"seeds": seeds, "only": only, "set": set}
        for name in (name for name, value in given.items() if value or (name == "seeds" and value is not None)):
            raise ConfigError(f"--{name.replace('_', '-')} does not apply to table1")
        _table1(scale, out or dated(what), resume, jobs)
        return
    study = REPRODUCTIONS[what].study(scale, data_of(what, data_dir)).changed(set, seeds, only)
    folder = StudyFolder(out or dated(what))
    means = Means(data_dir, download, jobs, processes)
    check_free(folder.path)
    folder.check(study, resume=resume)
    check_study(folder.missing(study.sub_runs()), means)
    folder.make(study)
    with locked(folder.path):
        run_study(study, folder, means)
        # A part of the settings gets no figure of the paper and no findings.
        _write(study, folder, what, whole=not only)


def _write(study: Study, folder: StudyFolder, what: str, *, whole: bool) -> None:
    """Write the summary, curves and figure of a study's runs, and print the summary.

    With `whole` the runs have all settings of the study, so its own figure and findings are made too.
    """
    runs = read_runs([folder.run(sub_run) for sub_run in study.sub_runs()])
    found = settings(runs)
    summary = summarise(study, found)
    write_results(summary, found, folder.path)
    print_settings(summary)
    made = REPRODUCTIONS[what]
    curves = read_curves(folder.path / "curves.csv")
    for line in made.findings(summary, curves) if made.findings and whole else []:
        print(line)
    save_figure(made.draw(curves) if whole else drawing.grid(curves), folder.path)
    print(f"figure: {folder.path / 'figure-light.svg'}")
    print(f"report: {write_report(runs, folder.path / 'report', overwrite=(folder.path / 'report').exists())}")


def _table1(scale: Scale, folder: Path, resume: bool, jobs: int | None) -> None:
    rows = tabulate(scale, folder, __version__, resume=resume, jobs=jobs)
    names = ("limit", "planned", "measured", "best", "planned_bytes", "best_bytes")
    headings = ("limit of T", "planned T", "measured", "measured, best eta", "bytes", "bytes, best eta")
    table = Table("compressor", "gradient", "exponent of", *headings)
    for column in table.columns[3:]:
        column.justify = "right"
    for row in rows:
        gradient = "Lipschitz" if row["lipschitz"] else "not Lipschitz"
        table.add_row(row["compressor"], gradient, row["against"], *(f"{row[name]:.2f}" for name in names))
    table.caption = (
        "slopes in log-log on known saddles; planned is the slope of the planned T over the same epsilon or d"
    )
    print_table(table)
    print(f"Table 1 with numbers: {folder / 'table1.json'} (and packsaddle plan table)")
    print(f"figure: {folder / 'figure-light.svg'}")


def main() -> None:
    """Run the study that the command line names."""
    serve(reproduce, PROGRAM)


if __name__ == "__main__":
    main()
