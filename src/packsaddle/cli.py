"""The command line: packsaddle demo | run | report | compressors."""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from packsaddle.config import load
from packsaddle.exchange import WorkerFailedError, under_launcher
from packsaddle.progress import megabytes
from packsaddle.runfolder import Run, make_new, read_runs
from packsaddle.schema import ConfigError


def demo(out: Path | None = None, workers: int = 2, serial: bool = False, epochs: float = 60.0, seed: int = 0) -> None:
    """Show compressed, perturbed SGD leaving a saddle that plain SGD sits on.

    Trains a deep autoencoder on scikit-learn's digits four times (dense; dense, RandomK 1% and TopK 1% with noise),
    prints a table and writes a figure and an HTML page.

    Args:
        out: A new folder for the runs and the report; by default one under runs/ named by the time.
        workers: Worker processes.
        serial: Simulate the workers in this process instead.
        epochs: Passes over the digits.
        seed: Seed of everything random.
    """
    from packsaddle import demo as demonstration
    from packsaddle.data import require
    from packsaddle.experiment import Job
    from packsaddle.report import write_report

    for module in ("matplotlib", "jinja2"):  # before the runs, not after
        require(module, "plot", "the demo's report")
    try:
        configs = demonstration.configs(workers, epochs, seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folder = out or _dated("demo")
    job = Job(tuple(configs.values()), tuple(folder / name for name in configs))
    job.check(workers)
    make_new(folder)
    job.run(workers, serial=serial)
    runs = [run for name in configs for run in read_runs([folder / name])]
    _print_table(runs)
    print(f"report: {write_report(runs, folder / 'report')}")


def run(
    config: Annotated[Path, tyro.conf.Positional],
    set: tuple[str, ...] = (),
    workers: int | None = None,
    serial: bool = False,
    data_dir: Path | None = None,
    download: bool = False,
    out: Path | None = None,
) -> None:
    """Train as a TOML file says, with one process or several.

    Under torchrun the world it made is used; otherwise this command starts its own workers.

    Args:
        config: The TOML file.
        set: Overrides, key=value by dotted key, as in: --set lr=0.05 compressor.ratio=0.001
        workers: Worker processes; overrides the file.
        serial: Simulate the workers in this process instead of starting processes.
        data_dir: Folder of the dataset (not needed for digits).
        download: Fetch the dataset into --data-dir if it is not there.
        out: A new folder for the run; by default (not under torchrun) one under runs/ named by the file and the time.
    """
    from packsaddle.experiment import Job, train_in_process_group

    overrides = [*set, f"workers={workers}"] if workers is not None else set
    loaded = load(config, overrides)
    if under_launcher():
        if out is None:  # a name made from the time could differ between workers
            raise ConfigError("--out is needed under torchrun")
        loaded = replace(loaded, workers=int(os.environ["WORLD_SIZE"]))
    folder = out or _dated(config.stem)
    job = Job((loaded,), (folder,), data_dir, download)
    if under_launcher():
        train_in_process_group(job, claim=True)
    else:
        job.check(loaded.workers)
        make_new(folder)
        job.run(loaded.workers, serial=serial)
    if _is_first():
        _print_table(read_runs([folder]))
        print(f"run folder: {folder}")


def report(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional], out: Path | None = None, overwrite: bool = False
) -> None:
    """Compare runs: a table, a figure and one self-contained HTML page.

    Args:
        runs: Run folders, or folders of run folders.
        out: A new folder for the report; by default `report` in the first folder given.
        overwrite: Allow the report's folder to exist.
    """
    from packsaddle.report import write_report

    if not runs:
        raise ConfigError("report needs at least one run folder")
    found = read_runs(runs)
    _print_table(found)
    print(f"report: {write_report(found, out or runs[0] / 'report', overwrite=overwrite)}")


def compressors(d: int = 1_000_000, ratio: float = 0.01, workers: int = 4, json: bool = False) -> None:
    """List every compressor: contraction, linear or not, protocol, bytes of a step and time on this machine.

    Args:
        d: Coordinates of the vector tried.
        ratio: Share of the coordinates, for those that have one.
        workers: Workers, for the bytes.
        json: Print JSON lines instead of a table.
    """
    from dataclasses import asdict
    from json import dumps

    from packsaddle import catalogue

    if d < 1 or workers < 1:
        raise ConfigError(f"d and workers must be at least 1, got {d} and {workers}")
    try:
        listed = catalogue.compressors(ratio)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if json:
        for compressor in listed:
            print(dumps(asdict(catalogue.measure(compressor, d, workers))))
        return
    table = Table("compressor", "mu", "kept", "linear", "protocol", "sent", "received", "ms")
    for column in table.columns[1:]:
        column.justify = "right"
    for e in (catalogue.measure(compressor, d, workers) for compressor in listed):
        linear = "yes" if e.linear else "no"
        sent, received = megabytes(e.sent), megabytes(e.received)
        table.add_row(
            e.compressor, f"{e.mu:.2g}", f"{e.kept:.1%}", linear, e.protocol, sent, received, f"{e.milliseconds:.1f}"
        )
    table.caption = f"d = {d:,}, {workers} workers; mu holds for every vector, kept is measured on a Gaussian one"
    _print(table)


def _print_table(runs: Sequence[Run]) -> None:
    from packsaddle.report import HEADINGS, cells, row

    table = Table(*HEADINGS, caption="+ still on the plateau at the end of the run")
    for column in table.columns[1:]:
        column.justify = "right"
    for found in runs:
        table.add_row(*cells(row(found)))
    _print(table)


def _print(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe or a file has no width to fit
    console.print(table)


def _dated(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def _is_first() -> bool:
    """Whether this process speaks to the user: under a launcher, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"


_COMMANDS: dict[str, Callable[..., Any]] = {"demo": demo, "run": run, "report": report, "compressors": compressors}


def main() -> None:
    """Entry point of the console script: bad input is one line on stderr and exit code 2."""
    try:
        tyro.extras.subcommand_cli_from_dict(_COMMANDS, prog="packsaddle")
    except ConfigError as error:
        if _is_first():
            print(f"packsaddle: error: {error}", file=sys.stderr)
        sys.exit(2)
    except WorkerFailedError as error:
        print(f"packsaddle: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    if under_launcher():
        # The work is done and on disk. Interpreters that take themselves apart beside gloo's threads abort now and
        # then, which the launcher would report as a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
