"""packsaddle demo | run."""

import os
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import tyro

from packsaddle.commands.console import dated, is_first, print_runs, require_plots
from packsaddle.config import Config, load
from packsaddle.exchange import check_interface, under_launcher
from packsaddle.runfolder import make_new, read_runs
from packsaddle.schema import ConfigError
from packsaddle.trackers import TrackerName

_LEAST_TIMEOUT, _MOST_TIMEOUT = 1.0, 1e7  # seconds; torch counts milliseconds and takes 0 for no wait at all


def demo(out: Path | None = None, workers: int = 2, serial: bool = False, epochs: float = 60.0, seed: int = 0) -> None:
    """Show compressed, perturbed SGD leaving a saddle that plain SGD sits on.

    Trains a deep autoencoder on scikit-learn's digits four times (dense; dense, RandomK 1% and TopK 1% with noise),
    prints a table and writes a figure and an HTML page. About two minutes on two cores.

    Examples:
        packsaddle demo
        packsaddle demo --serial --epochs 20 --out runs/short

    Args:
        out: A new folder for the runs and the report; by default one under runs/ named by the time.
        workers: Worker processes.
        serial: Simulate the workers in this process instead, one after the other.
        epochs: Passes of all workers together over the digits.
        seed: Seed of everything random.
    """
    from packsaddle import demo as demonstration
    from packsaddle.experiment import Job
    from packsaddle.report import write_report

    require_plots("the demo's report")
    try:
        configs = demonstration.configs(workers, epochs, seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    folder = out or dated("demo")
    job = Job(tuple(configs.values()), tuple(folder / name for name in configs))
    job.check(workers)
    make_new(folder)
    job.run(workers, "serial" if serial else "processes")
    runs = [run for name in configs for run in read_runs([folder / name])]
    print_runs(runs)
    print(f"report: {write_report(runs, folder / 'report')}")


def run(
    config: Annotated[Path, tyro.conf.Positional],
    set: tuple[str, ...] = (),
    workers: int | None = None,
    serial: bool = False,
    fused: bool = False,
    data_dir: Path | None = None,
    download: bool = False,
    out: Path | None = None,
    track: tuple[TrackerName, ...] = (),
    timeout: float | None = None,
) -> None:
    """Train as a TOML file says, with one process or several.

    Under torchrun the world it made is used; otherwise this command starts its own workers.

    Examples:
        packsaddle run config.toml --workers 2 --set lr=0.05 compressor.ratio=0.001
        packsaddle run config.toml --serial --workers 10 --out runs/a
        torchrun --nproc-per-node 4 -m packsaddle.cli run config.toml --out runs/b

    Args:
        config: The TOML file; packsaddle init writes one with every key.
        set: Overrides of the file, key=value by dotted key; a value is TOML, or a bare word.
        workers: Worker processes, W; by default the file's.
        serial: Simulate the workers in this process, one after the other, instead of starting processes.
        fused: Simulate them as one that holds their mean: faster, for compressors that travel by all-reduce.
        data_dir: Folder of the dataset (not needed for digits, nor for Python's own text).
        download: Fetch the dataset into --data-dir if it is not there.
        out: A new folder for the run; by default (not under torchrun) one under runs/ named by the file and the time.
        track: Trackers that get the run's numbers too, in files in its folder: tensorboard, wandb (offline), mlflow.
        timeout: Seconds that a worker process waits for the others before it gives up; by default 1800 with gloo.
    """
    from packsaddle.experiment import How, Job, train_in_process_group

    if serial and fused:
        raise ConfigError("--serial and --fused are two ways to simulate workers; choose one")
    if timeout is not None and (serial or fused):
        raise ConfigError("--timeout is of worker processes, and --serial and --fused start none")
    patience = _patience(timeout)
    loaded = load(config, set)
    if workers is not None:
        loaded = _with_workers(loaded, workers)
    if under_launcher():
        if out is None:  # a name made from the time could differ between workers
            raise ConfigError("--out is needed under torchrun")
        loaded = replace(loaded, workers=int(os.environ["WORLD_SIZE"]))
    folder = out or dated(config.stem)
    job = Job((loaded,), (folder,), data_dir, download, track=track, timeout=patience)
    if under_launcher():
        train_in_process_group(job, claim=True)
    else:
        how: How = "fused" if fused else "serial" if serial else "processes"
        if how == "processes" and loaded.workers > 1:
            check_interface()
        job.check(loaded.workers, how)
        make_new(folder)
        job.run(loaded.workers, how)
    if is_first():
        print_runs(read_runs([folder]))
        print(f"run folder: {folder}")


def _patience(seconds: float | None) -> timedelta | None:
    if seconds is not None and not _LEAST_TIMEOUT <= seconds <= _MOST_TIMEOUT:
        raise ConfigError(f"--timeout must be from {_LEAST_TIMEOUT:g} to {_MOST_TIMEOUT:g} seconds, got {seconds:g}")
    return None if seconds is None else timedelta(seconds=seconds)


def _with_workers(config: Config, workers: int) -> Config:
    try:
        return replace(config, workers=workers)
    except ValueError as error:
        raise ConfigError(f"--{error}") from None
