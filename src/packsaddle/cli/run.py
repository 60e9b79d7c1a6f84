"""packsaddle demo | init | run."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import tyro

from packsaddle.cli.console import dated, is_first, print_runs, require_plots
from packsaddle.cli.parsing import Seconds
from packsaddle.comm.launching import check_interface, under_launcher
from packsaddle.comm.managed import check_lighthouse
from packsaddle.errors import ConfigError, config_errors
from packsaddle.messages import printable
from packsaddle.runs.config import Config, load
from packsaddle.runs.run_folder import Run, make_new, read_runs
from packsaddle.runs.templates import TASKS, TaskName, template
from packsaddle.runs.trackers import TrackerName
from packsaddle.theory.noise_walk import FAR, GOOD

if TYPE_CHECKING:
    from packsaddle.runs.job import How, Job


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
    from packsaddle.runs import templates
    from packsaddle.runs.job import Job
    from packsaddle.runs.report import write_report

    require_plots("the demo's report")
    with config_errors():
        configs = templates.demo_configs(workers, epochs, seed)
    folder = out or dated("demo")
    job = Job(tuple(configs.values()), tuple(folder / name for name in configs))

    # Checked before the folder is made, so that a refusal leaves nothing behind.
    job.check(workers)
    make_new(folder)
    job.run(workers, "serial" if serial else "processes")
    runs = [run for name in configs for run in read_runs([folder / name])]
    print_runs(runs)
    print(f"report: {write_report(runs, folder / 'report')}")


def run(
    config: Annotated[Path | None, tyro.conf.Positional] = None,
    set: tuple[str, ...] = (),
    workers: int | None = None,
    serial: bool = False,
    batched: bool = False,
    fused: bool = False,
    data_dir: Path | None = None,
    download: bool = False,
    out: Path | None = None,
    resume: Path | None = None,
    checkpoint_every: int | None = None,
    timeout: Seconds | None = None,
    track: tuple[TrackerName, ...] = (),
    elastic: str | None = None,
    memory: Path | None = None,
) -> None:
    """Train from a TOML configuration, on one process or several.

    Under torchrun the world it made is used; otherwise this command starts its own workers. A run that was killed, or
    stopped by SIGTERM, continues from its last checkpoint with --resume, bit for bit.

    Examples:
        packsaddle run config.toml --workers 2 --set lr=0.05 compressor.ratio=0.001
        packsaddle run config.toml --serial --workers 10 --out runs/a
        packsaddle run --resume runs/a
        torchrun --nproc-per-node 4 --max-restarts 3 -m packsaddle.cli run config.toml --resume runs/b
        packsaddle run local.toml --elastic http://10.0.0.1:29510 --memory worker.memory

    Args:
        config: The TOML file; packsaddle init writes one with every key.
        set: Overrides of the file, key=value by dotted key; a value is TOML, or a bare word; key= drops the key.
        workers: Worker processes, W; by default the file's.
        serial: Simulate the workers in this process, one after the other, instead of starting processes.
        batched: The same with all their gradients in one pass, faster for many workers with small batches.
        fused: Simulate them as one that holds their mean: faster, for compressors that travel by all-reduce.
        data_dir: Folder of the dataset (not needed for digits, nor for Python's own text).
        download: Fetch the dataset into --data-dir if it is not there.
        out: A new folder for the run; by default (not under torchrun) one under runs/ named by the file and the time.
        resume: The folder of a run to continue; with CONFIG it may not have begun yet.
        checkpoint_every: Steps between checkpoints; by default about an epoch, at least half a minute; 0: none.
        timeout: How long a worker process waits for the others before it gives up; by default 30min with gloo.
        track: Trackers that get the run's numbers too, in files in its folder: tensorboard, wandb (offline), mlflow.
        elastic: Be one of the workers, which come and go, under this torchft_lighthouse; the file must have [local].
        memory: With --elastic, the file in which this worker's error memory waits while it is away.
    """
    from packsaddle.runs.job import Job, train_under_launcher
    from packsaddle.runs.run_checkpoints import CheckpointPolicy

    # Flags that exclude one another.
    how = _way(serial=serial, batched=batched, fused=fused)
    if timeout is not None and how != "processes":
        raise ConfigError(f"--timeout is of worker processes, and --{how} starts none")
    if under_launcher() and how != "processes":
        raise ConfigError(f"--{how} simulates workers in one process, and torchrun has started several; leave it out")
    patience = _patience(timeout)
    if elastic is None and memory is not None:
        raise ConfigError("--memory goes with --elastic")
    if elastic is not None:
        _check_alone(workers, how, resume, checkpoint_every)

    # The configuration, its folder, and how the run is saved or continued.
    loaded = _configured(config, set, workers, resume, out)
    if elastic is not None:
        from packsaddle.runs.elastic_run import check_elastic

        loaded = tuple(map(check_elastic, loaded))
        check_lighthouse(elastic)
    folder = resume or out or dated(config.stem if config else "run")
    again = {"--checkpoint-every": checkpoint_every, "--timeout": timeout, "--track": " ".join(track) or None}
    with config_errors("--"):
        every = 0 if elastic else checkpoint_every
        saving = CheckpointPolicy(every, hint=_going_on(folder, how, workers, data_dir, again))
    job = Job(loaded, (folder,), data_dir, download, track=track, saving=saving, timeout=patience)
    job = replace(job, lighthouse=elastic, memory=memory)
    job = replace(job, resume=resume is not None)

    # Under torchrun this process is one of the workers; else it starts them.
    if under_launcher():
        done = train_under_launcher(job)
    else:
        located = job.located()
        done = None if located is None else _train(located, workers, how)
    if is_first() and done is not False:
        if done is None:
            print(f"{folder} is done: nothing to continue")
        (found,) = read_runs([folder])
        print_runs([found])
        for remark in remarks(found):
            print(remark)
        where = printable(str(folder))
        print(f"run folder: {where}\na page of it: packsaddle report {where}")


def remarks(run: Run) -> list[str]:
    """Return remarks on a finished run: the noise that would suit it, and a loss that stood still."""
    from packsaddle.runs.report.curves import standstill

    noise, still, said = (run.summary or {}).get("noise") or {}, standstill(run.metrics), []
    suggested = noise.get("suggested")
    if suggested is not None:
        times = noise.get("times")
        own = f", {times:,.3g} times the gradient's own noise" if times else ""
        was = f"noise.std was {noise['r']:g}{own}" if noise["r"] else "none was added"
        walk = f"noise.std = {suggested:.1g} would move x by {GOOD:g} times ||x_0|| over this run"
        said.append(f"noise: {was}; {walk}, which helps against plateaus")

    # Noise of the suggested size helps against a plateau; too much of it keeps the loss up.
    if still is not None:
        remedy = ""
        if suggested is not None and noise["r"] < suggested / 2:
            remedy = f", and noise.std = {suggested:.1g} is suggested against a plateau"
        elif noise.get("walk") is not None and noise["walk"] > FAR:
            remedy = ", unless it is the noise that keeps it up: lower noise.std"
        said.append(
            f"the loss has stood still since step {still.since:,} ({still.level:.4f}): a plateau or a minimum; "
            f"packsaddle certify {run.path} --epsilon E tells which{remedy}"
        )
    return said


def _configured(
    config: Path | None, overrides: tuple[str, ...], workers: int | None, resume: Path | None, out: Path | None
) -> tuple[Config, ...]:
    """Return the configuration of the command; none if the run's folder has it."""
    if resume is not None and out is not None:
        raise ConfigError("--resume names the folder; leave --out out")
    if config is None:
        if resume is None:
            raise ConfigError("run needs CONFIG, a TOML file (packsaddle init writes one), or --resume RUN_DIR")
        if overrides:
            raise ConfigError("--set goes with CONFIG; a run that continues has its configuration in its folder")
        return ()

    # Number of workers: torchrun's, else the flag's, else the configuration's.
    loaded = load(config, overrides)
    if workers is not None:
        loaded = _with_workers(loaded, workers)
    if under_launcher():
        if out is None and resume is None:  # a name made from the time could differ between workers
            raise ConfigError("--out is needed under torchrun")
        world = int(os.environ["WORLD_SIZE"])
        if workers is not None and workers != world:
            raise ConfigError(f"--workers is {workers}, and torchrun has started {world}; leave it out")
        loaded = replace(loaded, workers=world)
    return (loaded,)


def _way(**simulations: bool) -> "How":
    """Return the way to the workers. Raises ConfigError for two."""
    chosen = [how for how, given in simulations.items() if given]
    if len(chosen) > 1:
        raise ConfigError(f"--{chosen[0]} and --{chosen[1]} are two ways to simulate workers; choose one")
    return cast("How", chosen[0]) if chosen else "processes"


def _check_alone(workers: int | None, how: "How", resume: Path | None, every: int | None) -> None:
    """Raise ConfigError for flags that are of workers which are all there."""
    flags: dict[str, Any] = {"--workers": workers, f"--{how}": None if how == "processes" else how}
    flags |= {"--resume": resume, "--checkpoint-every": every}
    for flag, given in flags.items():
        if given is not None:
            raise ConfigError(f"{flag} does not go with --elastic: each worker is started by itself")
    if under_launcher():
        raise ConfigError("--elastic needs no torchrun: each worker is started by itself")


def _going_on(folder: Path, how: str, workers: int | None, data_dir: Path | None, again: Mapping[str, object]) -> str:
    """Return the command that resumes a stopped run, with those of the flags that are not None."""
    if under_launcher():
        return "the same command, with --resume instead of --out" if "--out" in sys.argv else "the same command again"
    words = ["packsaddle", "run", "--resume", str(folder)]
    words += [] if workers is None else ["--workers", str(workers)]
    words += [] if how == "processes" else [f"--{how}"]
    words += [] if data_dir is None else ["--data-dir", str(data_dir)]
    for name, value in again.items():
        words += [] if value is None else [name, *str(value).split()]
    return shlex.join(words)


def _train(job: "Job", workers: int | None, how: "How") -> bool:
    (config,) = job.configs
    if workers is not None:
        config = _with_workers(config, workers)
    job = replace(job, configs=(config,))
    if how == "processes" and config.workers > 1:
        check_interface()
    job.check(config.workers, how)
    job.make_folders()
    return job.run(config.workers, how)


def _patience(seconds: float | None) -> timedelta | None:
    if seconds is not None and not _LEAST_TIMEOUT <= seconds <= _MOST_TIMEOUT:
        raise ConfigError(f"--timeout must be from {_LEAST_TIMEOUT:g} to {_MOST_TIMEOUT:g} seconds, got {seconds:g}")
    return None if seconds is None else timedelta(seconds=seconds)


def _with_workers(config: Config, workers: int) -> Config:
    with config_errors("--"):
        return replace(config, workers=workers)


_HEADING = """{about}

    packsaddle run {file}{flags}

What is commented out is at its default, or an example of what is off."""


def init(
    file: Annotated[Path, tyro.conf.Positional] = Path("config.toml"), task: TaskName = "char-transformer"
) -> None:
    """Write a configuration to start from, with a comment for every key.

    Examples:
        packsaddle init
        packsaddle init local.toml --task char-transformer-local
        packsaddle init digits.toml --task digits

    Args:
        file: The new TOML file; a file that exists is left as it is, and refused.
        task: What to train. char-transformer needs nothing, nor does char-transformer-local, the same by local updates;
            digits needs packsaddle[digits]; mnist-autoencoder (the paper's) and resnet18 (on CIFAR-10) need
            packsaddle[vision] and a folder of data.
    """
    chosen = TASKS[task]
    text = template(chosen.config, _HEADING.format(about=chosen.about, file=file, flags=chosen.flags))
    try:
        content = text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{printable(str(file))} is not a name that a file of UTF-8 text can hold") from None

    # Mode x overwrites no file; one that was written in part is removed.
    try:
        with file.open("xb") as new:
            try:
                new.write(content)
                new.flush()
            except OSError:
                file.unlink()
                raise
    except FileExistsError:
        raise ConfigError(f"{file} exists already, and is left as it is; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    print(f"{chosen.about}\n{file}, every key with a comment. Train with: packsaddle run {file}{chosen.flags}")
