"""The command `python -m lab demo`: an escape from a saddle, and local updates on a slow link."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lab.cli.console import dated, print_runs, require_plots
from lab.runs.config import Config
from lab.runs.run_folder import Run, read_runs
from lab.runs.templates import demo_configs, local_demo_configs
from packsaddle.cli.console import number_table, print_table
from packsaddle.cli.folders import make_new
from packsaddle.comm.communicator import ring_all_reduce
from packsaddle.errors import config_errors

if TYPE_CHECKING:
    from lab.runs.job import How, Job
    from lab.runs.report.tables import Row

MBIT = 50  # rate of the link for which the second part computes times, in Mbit/s


def demo(
    out: Path | None = None,
    workers: int = 2,
    serial: bool = False,
    epochs: float = 32.0,
    text_epochs: float = 1.0,
    seed: int = 0,
) -> None:
    """Show an escape from a saddle, and local updates on a slow link.

    First trains a deep autoencoder on scikit-learn's digits four times: uncompressed without noise, and with noise
    uncompressed, with RandomK 1% and with TopK 1%. Then trains a small transformer on the text of Python's own
    reference with AdamW, for the same number of steps by one machine alone, by dense training and by local updates.
    Each part prints a table, writes an HTML page, and ends in a sentence. Takes a minute on two cores.

    Examples:
        python -m lab demo
        python -m lab demo --serial --epochs 20 --out runs/short

    Args:
        out: New folder for the runs and the reports; by default runs/demo-DATE-TIME.
        workers: Number of worker processes. With 1, the second part is skipped.
        serial: Simulate the workers sequentially in this process instead.
        epochs: Passes over the digits, counted over all workers together.
        text_epochs: Passes over the text, counted over all workers together.
        seed: Seed of all random numbers.
    """
    from lab.runs.report import row, write_report

    require_plots("the demo's reports")
    folder = out or dated("demo")
    how: How = "serial" if serial else "processes"
    with config_errors():
        saddle = jobs_of(demo_configs(workers, epochs, seed), folder / "saddle")
        text = jobs_of(local_demo_configs(workers, text_epochs, seed), folder / "slow-link") if workers > 1 else []

    # Validate both parts before the folder is created, so that invalid input leaves no files.
    for job in (*saddle, *text):
        job.check(job.configs[0].workers)
    make_new(folder)

    # The first part.
    runs = trained(saddle, how)
    print_runs(runs)
    conclusions = [saddle_conclusion([row(run) for run in runs])]
    pages = [write_report(runs, folder / "saddle" / "report", lead=conclusions[0])]

    # The second part.
    if text:
        runs = trained(text, how)
        links = link_rows([row(run) for run in runs], workers)
        print_links(links)
        conclusions.append(link_conclusion(links))
        pages.append(write_report(runs, folder / "slow-link" / "report", lead=conclusions[-1]))
    print("\n".join([*(f"report: {page}" for page in pages), *filter(None, conclusions)]))


def jobs_of(configs: Mapping[str, Config], folder: Path) -> list["Job"]:
    """Return jobs for runs in subfolders of `folder`, named by the keys of `configs`.

    Consecutive runs with the same number of workers are one job, and so share their processes.
    """
    from lab.runs.job import Job

    groups = [[*names] for _, names in groupby(configs, lambda name: configs[name].workers)]
    return [Job(tuple(configs[name] for name in names), tuple(folder / name for name in names)) for names in groups]


def trained(jobs: Sequence["Job"], how: "How") -> list[Run]:
    """Do the runs of the jobs, and return them in the order of the jobs."""
    for job in jobs:
        job.run(job.configs[0].workers, how)
    return [run for job in jobs for folder in job.folders for run in read_runs([folder])]


def saddle_conclusion(rows: Sequence["Row"]) -> str:
    """Return a sentence on the runs of the first part, of which the first has no noise.

    Returns "" if they do not show the escape.
    """
    without, *noisy = rows
    if without.left_plateau is not False or not all(run.left_plateau for run in noisy):
        return ""
    epochs = [run.plateau_epochs or 0.0 for run in noisy]
    compression = min(run.compression or 1.0 for run in noisy[1:])
    return (
        f"Without noise SGD stays at the saddle to the end. With noise it leaves after {min(epochs):.0f} to "
        f"{max(epochs):.0f} epochs, also with RandomK and TopK, whose messages have 1/{compression:.0f} of the bytes."
    )


class LinkRow(NamedTuple):
    """The table row of one run of the second part."""

    run: str
    loss: float  # test loss
    megabytes: float  # sent by each worker
    seconds: float  # computing, and then the bytes over the link


def link_rows(rows: Sequence["Row"], workers: int) -> list[LinkRow]:
    """Return the table of the second part's runs: alone, dense, local.

    One machine alone sends nothing. Dense training, which was one process here, sends its gradients by a ring
    all-reduce, and its workers compute as long as those of local updates.
    """
    alone, dense, local = rows
    gradients = ring_all_reduce(round(dense.megabytes * 1e6), workers).sent / 1e6
    sent = [(alone, 0.0, alone.seconds), (dense, gradients, local.seconds), (local, local.megabytes, local.seconds)]
    return [LinkRow(run.run, run.test_loss or nan, mb, seconds + 8 * mb / MBIT) for run, mb, seconds in sent]


def print_links(rows: Sequence[LinkRow]) -> None:
    table = number_table("run", "test loss", "MB sent by a worker", f"seconds at {MBIT} Mbit/s")
    for row in rows:
        table.add_row(row.run, f"{row.loss:.3f}", f"{row.megabytes:,.1f}", f"{row.seconds:.0f}")
    print_table(table)


def link_conclusion(rows: Sequence[LinkRow]) -> str:
    """Return a sentence on the runs of the second part; "" if local updates end above the loss of one machine alone."""
    alone, dense, local = rows
    if not local.loss < alone.loss:
        return ""
    ratio = dense.megabytes / local.megabytes
    return (
        f"In the same number of steps local updates reach a test loss of {local.loss:.2f}, dense training "
        f"{dense.loss:.2f}, and one machine alone {alone.loss:.2f}. Local updates send 1/{ratio:.0f} of the bytes of "
        f"dense training: at {MBIT} Mbit/s they take {local.seconds:.0f} seconds instead of {dense.seconds:.0f}."
    )
