"""The commands `python -m lab init` and `python -m lab run`."""

import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lab.cli.console import dated, print_runs
from lab.runs.config import Config, load
from lab.runs.run_folder import Run, read_runs
from lab.runs.templates import TASKS, TaskName, template
from packsaddle.cli.console import is_first
from packsaddle.cli.flags import grouped
from packsaddle.cli.parsing import Seconds
from packsaddle.comm.launching import under_launcher
from packsaddle.comm.managed import check_lighthouse
from packsaddle.errors import ConfigError, config_errors
from packsaddle.messages import printable
from packsaddle.theory.noise_walk import FAR, GOOD

if TYPE_CHECKING:
    from lab.runs.job import How, Job


# Limits of --timeout, seconds. torch counts whole milliseconds, and 0 would mean that it does not wait at all.
_LEAST_TIMEOUT, _MOST_TIMEOUT = 1.0, 1e7


@grouped(
    {
        "": "set workers out",
        "data": "data_dir download",
        "simulation": "serial batched fused",
        "checkpoint": "resume checkpoint_every",
        "worker": "timeout elastic",
    }
)
def run(
    config: Path | None = None,
    /,
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
    elastic: str | None = None,
) -> None:
    """Train from a TOML configuration, in one process or several.

    Under torchrun its workers are used; otherwise this command starts them. A run that was killed, or stopped by
    SIGTERM, continues from its last checkpoint with --resume; results are bitwise identical to an uninterrupted run's.

    To restart workers, torchrun also needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.

    Examples:
        python -m lab run config.toml --workers 2 --set lr=0.05 compressor.ratio=0.001
        python -m lab run config.toml --serial --workers 10 --out runs/a
        python -m lab run --resume runs/a
        torchrun --standalone --nproc-per-node 4 --max-restarts 3 -m lab run config.toml --resume runs/b
        python -m lab run local.toml --elastic http://10.0.0.1:29510

    Args:
        config: TOML file; python -m lab init writes one with every key.
        set: Overrides of keys in the file, such as lr=0.05 or compressor.ratio=0.001; the value is TOML or a bare
            word. key= removes the key.
        workers: Number of worker processes; by default the file's.
        serial: Simulate the workers sequentially in this process, instead of starting processes.
        batched: Like --serial, but compute all gradients in one pass: faster for many workers with small batches.
        fused: Simulate all workers as one with their mean gradient, which is faster; needs a compressor that uses
            all-reduce.
        data_dir: Folder of the dataset (not needed for digits, nor for Python's own text).
        download: Download the dataset to --data-dir if it is missing.
        out: New folder for the run; by default runs/FILE-DATE-TIME. Required under torchrun.
        resume: Folder of the run to continue. With CONFIG, a missing or empty folder starts a new run.
        checkpoint_every: Steps between checkpoints; by default about one epoch and at least 30 s. 0: none.
        timeout: Time after which a worker that waits for the others fails, such as 90s or 5min; by default 30min with
            gloo.
        elastic: URL of a torchft_lighthouse. Run as one worker that may join and leave; needs [local] in the file.
    """
    from lab.runs.job import Job, train_under_launcher
    from lab.runs.run_checkpoints import CheckpointPolicy

    # Raise errors for flags that exclude one another.
    how = _simulation(serial=serial, batched=batched, fused=fused)
    if timeout is not None and how != "processes":
        raise ConfigError(f"--timeout applies to worker processes, but --{how} starts none")
    if under_launcher() and how != "processes":
        raise ConfigError(f"--{how} simulates workers in one process, but torchrun started several; leave it out")
    if timeout is not None and not _LEAST_TIMEOUT <= timeout <= _MOST_TIMEOUT:
        limits = f"from {_LEAST_TIMEOUT:g} to {_MOST_TIMEOUT:g} seconds"
        raise ConfigError(f"--timeout must be {limits}, got {timeout:g}")
    if elastic is not None:
        _check_alone(workers, how, resume, checkpoint_every)

    # Load the configuration; choose the folder and the steps between checkpoints.
    loaded = _configured(config, set, workers, resume, out)
    if elastic is not None:
        from lab.runs.elastic_run import check_elastic

        loaded = tuple(map(check_elastic, loaded))
        check_lighthouse(elastic)
    folder = resume or out or dated(config.stem if config else "run")
    again = {"--checkpoint-every": checkpoint_every, "--timeout": timeout}
    with config_errors("--"):
        every = 0 if elastic else checkpoint_every
        saving = CheckpointPolicy(every, hint=_resume_command(folder, how, workers, data_dir, again))
    job = Job(
        loaded,
        (folder,),
        data_dir,
        download,
        saving=saving,
        resume=resume is not None,
        timeout=None if timeout is None else timedelta(seconds=timeout),
        lighthouse=elastic,
    )

    # Under torchrun this process is a worker; otherwise it starts the workers.
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
        print(f"run folder: {where}\na page of it: python -m lab report {where}")


def remarks(run: Run) -> list[str]:
    """Return remarks on a finished run, as lines of text.

    They say that nothing was compressed, that the loss has stopped falling, and which standard deviation of the noise
    is suggested. The last two are made only for runs that ended on a plateau, according to their losses or to the
    plateau's level in the configuration.
    """
    from lab.runs.report.curves import standstill
    from lab.runs.report.tables import plateau

    summary = run.summary or {}
    noise, still, found = summary.get("noise") or {}, standstill(run.metrics), []
    if run.config.get("compressor", {}).get("kind") == "Identity":
        default = "" if run.config.get("local") else ", the default without [local]"
        found.append(
            f"nothing was compressed: compressor.kind is Identity{default}; packsaddle compressors compares the others"
        )
    elif summary.get("compressed_parameters") == 0:
        found.append(
            f"nothing was compressed: all tensors are vectors or smaller than dense_below = {run.config['dense_below']}"
        )

    # Suggest noise for this run's length.
    suggested, (_, left) = noise.get("suggested"), plateau(run.metrics, run.config.get("plateau"))
    if suggested is not None and (still is not None or left is False):
        times = noise.get("times")
        own = f", {times:,.3g} times the gradient's own noise" if times else ""
        was = f"noise.std was {noise['r']:g}{own}" if noise["r"] else "none was added"
        walk = f"noise.std = {suggested:.1g} would move x by {GOOD:g} ||x_0|| over this run"
        found.append(f"noise: {was}; {walk}, which helps to leave plateaus")

    # Suggest more noise, which helps to leave a plateau, or less, since much noise keeps the loss high.
    if still is not None:
        remedy = ""
        if suggested is not None and noise["r"] < suggested / 2:
            remedy = f"; noise.std = {suggested:.1g} is suggested to leave a plateau"
        elif noise.get("walk") is not None and noise["walk"] > FAR:
            remedy = "; or the noise keeps the loss high: lower noise.std"
        found.append(
            f"the loss has stopped falling at step {still.since:,} ({still.level:.4f}): a plateau or a minimum; "
            f"python -m lab certify {run.path} --epsilon E distinguishes them{remedy}"
        )
    return found


def _configured(
    config: Path | None, overrides: tuple[str, ...], workers: int | None, resume: Path | None, out: Path | None
) -> tuple[Config, ...]:
    """Return the configuration that the flags name, in a tuple.

    The tuple is empty if only `resume` is given, since the configuration is then in the run's folder.
    """
    if resume is not None and out is not None:
        raise ConfigError("--resume already sets the folder; leave out --out")
    if config is None:
        if resume is None:
            raise ConfigError("run needs CONFIG, a TOML file (python -m lab init writes one), or --resume RUN_DIR")
        if overrides:
            raise ConfigError("--set needs CONFIG; a resumed run keeps the configuration in its folder")
        return ()

    # Set the number of workers: torchrun's, else the flag's, else the configuration's.
    loaded = load(config, overrides)
    if workers is not None:
        loaded = _with_workers(loaded, workers)
    if under_launcher():
        if out is None and resume is None:  # a name made from the time could differ between workers
            raise ConfigError("--out is needed under torchrun")
        world = int(os.environ["WORLD_SIZE"])
        if workers is not None and workers != world:
            raise ConfigError(f"--workers is {workers}, but torchrun started {world}; leave it out")
        loaded = replace(loaded, workers=world)
    return (loaded,)


def _simulation(**simulations: bool) -> "How":
    chosen = [how for how, given in simulations.items() if given]
    if len(chosen) > 1:
        raise ConfigError(f"--{chosen[0]} and --{chosen[1]} are two ways to simulate workers; choose one")
    return cast("How", chosen[0]) if chosen else "processes"


def _check_alone(workers: int | None, how: "How", resume: Path | None, every: int | None) -> None:
    flags: dict[str, Any] = {"--workers": workers, f"--{how}": None if how == "processes" else how}
    flags |= {"--resume": resume, "--checkpoint-every": every}
    for flag, given in flags.items():
        if given is not None:
            raise ConfigError(f"{flag} cannot be used with --elastic: each worker is started separately")
    if under_launcher():
        raise ConfigError("--elastic cannot be used under torchrun: each worker is started separately")


def _resume_command(
    folder: Path, how: str, workers: int | None, data_dir: Path | None, again: Mapping[str, object]
) -> str:
    """Return the command line that resumes a stopped run.

    `again` has further flags and their values; flags with the value None are omitted.
    """
    if under_launcher():
        return "the same command, with --resume instead of --out" if "--out" in sys.argv else "the same command again"
    words = ["python", "-m", "lab", "run", "--resume", str(folder)]
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
    job.check(config.workers, how)
    job.make_folders()
    return job.run(config.workers, how)


def _with_workers(config: Config, workers: int) -> Config:
    with config_errors("--"):
        return replace(config, workers=workers)


_HEADING = """{about}

    python -m lab run {file}{flags}

What is commented out is at its default, or an example of what is off."""


def init(file: Path = Path("config.toml"), /, task: TaskName = "char-transformer") -> None:
    """Write a configuration file with a comment on every key.

    Examples:
        python -m lab init
        python -m lab init local.toml --task char-transformer-local
        python -m lab init digits.toml --task digits

    Args:
        file: The TOML file to create; an existing file is an error.
        task: The model and data. char-transformer, and char-transformer-local (the same with local updates), need no
            extra; digits needs packsaddle[digits]; mnist-autoencoder (the paper's) and resnet18 (on CIFAR-10) need
            packsaddle[vision] and a data folder.
    """
    chosen = TASKS[task]
    text = template(chosen.config, _HEADING.format(about=chosen.about, file=file, flags=chosen.flags))
    try:
        content = text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{printable(str(file))} cannot be written in UTF-8 text; choose another name") from None

    # Mode "x" fails if the file exists, so nothing is overwritten. After an error, a partly written file is removed.
    try:
        with file.open("xb") as new:
            try:
                new.write(content)
                new.flush()
            except OSError:
                file.unlink()
                raise
    except FileExistsError:
        raise ConfigError(f"{file} already exists; choose another name") from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}") from None
    print(f"{chosen.about}\n{file}, every key with a comment. Train with: python -m lab run {file}{chosen.flags}")
