"""Jobs: configured runs with their folders, executed by worker processes or in a simulation."""

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from lab.runs.batched import why_not_batched
from lab.runs.config import Config, first_difference
from lab.runs.folder_lock import FolderLock, check_free, locked
from lab.runs.run_checkpoints import NEVER, STOPPED, CheckpointPolicy, LoadingError, find, state_of
from lab.runs.run_folder import RunFolder, environment
from lab.runs.trainer import Trainer
from lab.tasks.sharding import shard
from packsaddle.cli.folders import make_new, written
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.cost_model import RingAllReduce
from packsaddle.comm.failures import TerminatedError
from packsaddle.comm.group import Solo, ambient_group, resolve
from packsaddle.comm.launching import launch, process_group, recording_sigterm
from packsaddle.comm.managed import connect
from packsaddle.comm.select_aggregator import choose
from packsaddle.comm.simulation import FusedGroup, simulate
from packsaddle.errors import ConfigError
from packsaddle.feedback.checks import DriftError
from packsaddle.feedback.guard import NonFiniteError
from packsaddle.local.options import Elastic
from packsaddle.options.schema import build, plain
from packsaddle.version import __version__

_ELASTIC_TIMEOUT = 60.0  # default timeout of a collective with --elastic, in seconds
# The ways to execute W workers. "processes" starts a process for each. The rest simulate them in this process: "serial"
# sequentially, "batched" also sequentially but with all gradients in one pass, and "fused" as one worker that holds the
# mean of all workers.
How = Literal["processes", "serial", "batched", "fused"]
AGREED: dict[str, type[Exception]] = {e.__name__: e for e in (LoadingError, NonFiniteError, DriftError)}


def can_be_fused(config: Config) -> bool:
    """Return True if a run's workers exchange only means, at identical parameters (see `FusedGroup`)."""
    if config.local is not None:
        return False
    exchange = config.exchange or "direct"
    try:
        choice = choose(config.compressor, exchange, d=1 << 20, dense=1, workers=max(2, config.workers))
    except ValueError:  # also raised for a compressor that is not bound to tensor shapes yet
        return False
    wires = choice.aggregator.collectives(1 << 20, 1, max(2, config.workers), 4)
    return all(isinstance(wire, RingAllReduce) for wire in wires)


def fastest_simulation(config: Config) -> How:
    return "fused" if can_be_fused(config) else "serial" if why_not_batched(config) else "batched"


@dataclass(frozen=True)
class Job:
    """Runs to do one after the other with the same workers, each in its own folder."""

    configs: tuple[Config, ...]
    folders: tuple[Path, ...]
    data_dir: Path | None = None
    download: bool = False
    quiet: bool = False
    saving: CheckpointPolicy = NEVER
    # True: continue the run in `folders[0]`, the only folder, if it has begun; `configs` may then be empty.
    resume: bool = False
    timeout: timedelta | None = None  # timeout of a collective of worker processes; None: torch's default
    lighthouse: str | None = None  # address of the torchft lighthouse, for one elastic worker; None: not elastic

    def check(self, workers: int, how: How = "processes") -> None:
        """Raise ConfigError for anything that would make a worker fail at its start. Call before launching workers."""
        self._check_simulation(how)
        for config in self.configs:
            trainer = Trainer(config, self.data_dir, self.download)
            for worker in range(workers):
                shard(trainer.data, config.data.shard, worker=worker, workers=workers, seed=config.seed)

    def located(self) -> "Job | None":
        """Return the job to do. With `resume` its configuration is the one saved in the folder.

        Returns None if that run is already done. Raises ConfigError for an invalid folder, or if another process is
        training in it.
        """
        if not self.resume:
            return self
        config = self.configs[0] if self.configs else None
        found, state = find(self.folders[0], config)
        if state == "done":
            return None
        check_free(self.folders[0])
        config = replace(found, workers=(config or found).workers)
        return replace(self, configs=(config,), saving=replace(self.saving, resume=state == "begun"))

    def make_folders(self) -> None:
        for folder in self.folders:
            check_free(folder)
            if not (self.resume and folder.is_dir()):
                make_new(folder)

    @contextmanager
    def held(self) -> Iterator[tuple[FolderLock | None, ...]]:
        """Context manager that holds the locks of the folders. Raises ConfigError if another process holds one."""
        with ExitStack() as stack:
            yield tuple(stack.enter_context(locked(folder)) for folder in self.folders)

    def _check_unchanged(self) -> None:
        """Raise ConfigError if another process has trained in the folder since `located` read it."""
        expected = "begun" if self.saving.resume else "new"
        if self.resume and state_of(self.folders[0]) != expected:
            raise ConfigError(
                f"{self.folders[0]} was trained in by another process in the meantime; run the command again"
            )

    def claim(self, stack: ExitStack) -> "Job | None":
        """Locate and check the job on rank 0, create its folders, and lock them until `stack` closes; collective.

        Returns the job, or None if it is already done. On failure rank 0 raises ConfigError, and all remaining workers
        exit with code 2.
        """
        collectives, problem = ObjectCollectives(resolve(None), torch.device("cpu")), None
        # Check that all workers have the same configuration.
        given = collectives.gather([plain(config) for config in self.configs])
        for worker, configs in enumerate(given):
            for ours, theirs in zip(given[0], configs, strict=False):
                if (different := first_difference(theirs, ours)) is not None:
                    key, his, first = different
                    raise ConfigError(
                        f"all workers must have the same configuration, but {key} is {first!r} for worker 0 and "
                        f"{his!r} for worker {worker}"
                    )

        # Only rank 0 checks, creates folders and acquires locks.
        outcome: dict[str, Any] = {"failed": False, "configs": None, "resume": False}
        if collectives.group.rank == 0:
            try:
                # The check constructs optimizers, which is collective; a group of one makes it local.
                with ambient_group(Solo()):
                    job = self.located()
                    if job is not None:
                        job.check(collectives.group.size)
                        job.make_folders()
                        stack.enter_context(job.held())
                        job._check_unchanged()
                        outcome |= {"configs": [plain(c) for c in job.configs], "resume": job.saving.resume}
            except ConfigError as error:
                problem, outcome["failed"] = error, True

        # Broadcast the outcome on rank 0 before any worker stops.
        outcome = collectives.gather(outcome)[0]
        if problem is not None:
            raise problem
        if outcome["failed"]:
            raise SystemExit(2)
        if outcome["configs"] is None:
            return None
        configs = tuple(replace(build(Config, c), workers=collectives.group.size) for c in outcome["configs"])
        return replace(self, configs=configs, saving=replace(self.saving, resume=outcome["resume"]))

    def train(self, *, batched: bool = False) -> bool:
        """Do the runs in the current group (see `packsaddle.comm.resolve`); collective. Returns False if stopped."""
        runs = len(self.configs)
        for i, (config, path) in enumerate(zip(self.configs, self.folders, strict=True), 1):
            trainer = self._trainer(config, batched)
            count = f"run {i} of {runs}, " if runs > 1 else ""
            is_first = trainer.group.rank == 0
            with written(path):
                if is_first:
                    self._describe(RunFolder(path), config, str(trainer.device), trainer.group.size)
                if not trainer.run(RunFolder(path), quiet=self.quiet, saving=self.saving, count=count):
                    return False
        return True

    def _trainer(self, config: Config, batched: bool) -> Trainer:
        if self.lighthouse is None:
            return Trainer(config, self.data_dir, self.download, batched)
        # The import is here since only elastic runs need it.
        from lab.runs.elastic_run import ElasticTrainer

        seconds = self.timeout.total_seconds() if self.timeout is not None else _ELASTIC_TIMEOUT
        elastic = Elastic(connect(self.lighthouse, timeout=seconds), weight="steps")
        return ElasticTrainer(config, self.data_dir, self.download, elastic)

    def _describe(self, folder: RunFolder, config: Config, device: str, workers: int) -> None:
        """Write config.json and environment.json. For a resumed run, only add this machine to environment.json."""
        here = environment(__version__, workers, device)
        if not self.saving.resume:
            folder.write_json("config.json", plain(config))  # written first, since it suffices to resume the run
        began = folder.path / "environment.json"
        if self.saving.resume and began.exists():
            found = json.loads(began.read_text())
            here = {**found, "resumed": [*found.get("resumed", []), here]}
        folder.write_json("environment.json", here)

    def run(self, workers: int, how: How) -> bool:
        """Do the runs with `workers` workers. Returns False if they were stopped after saving a checkpoint.

        Raises ConfigError if a run does not support `how`, or if another process uses a folder. Raises TerminatedError
        if the launcher was stopped and the workers have not saved.
        """
        with self.held() as locks:
            self._check_unchanged()
            if how == "processes" and workers > 1:
                try:
                    outcome = launch(train_in_process_group, (self, locks), workers)
                except TerminatedError:
                    if (self.folders[-1] / STOPPED).is_file():
                        return False
                    raise
                if isinstance(outcome, tuple):
                    kind, message = outcome
                    raise AGREED[kind](message)
                return bool(outcome)

            # One worker, or a simulation, runs in this process.
            with self._saving_on_sigterm():
                if workers == 1:
                    return self.train()
                self._check_simulation(how)
                if how != "fused":
                    return all(simulate(lambda rank: self.train(batched=how == "batched"), workers))
                with ambient_group(FusedGroup(workers)):
                    return self.train()

    def _saving_on_sigterm(self) -> AbstractContextManager[None]:
        return recording_sigterm() if self.saving.on and self.saving.stops else nullcontext()

    def _check_simulation(self, how: How) -> None:
        for config in self.configs:
            if how == "batched" and (reason := why_not_batched(config)):
                raise ConfigError(f"{reason}; use --serial")
            if how == "fused" and not can_be_fused(config):
                if config.local is not None:
                    raise ConfigError(
                        "local: each worker has its own parameters, but a fused simulation one copy; use --serial"
                    )
                exchange = config.exchange or "direct"
                raise ConfigError(
                    f"a fused simulation needs messages that are averaged by all-reduce, but "
                    f"{type(config.compressor).__name__} by exchange {exchange!r} sends more; use --serial"
                )


def train_in_process_group(job: Job, locks: tuple[FolderLock | None, ...]) -> bool | tuple[str, str]:
    """Call `Job.train` in a process started by `launch`, and return its result.

    For an expected error, returns its class name and its message. `locks` are the launcher's locks: they are also held
    by this process while it trains, in case the launcher is killed.
    """
    with _in_process_group(job), ExitStack() as stack:
        for lock in filter(None, locks):
            stack.callback(lock.close)
        try:
            return job.train()
        except tuple(AGREED.values()) as error:
            return type(error).__name__, str(error)


def train_under_launcher(job: Job) -> bool | None:
    """Call `Job.claim` and `Job.train` in a process started by torchrun. Return None if the job was already done."""
    with _in_process_group(job), ExitStack() as stack:
        claimed = job.claim(stack)
        return None if claimed is None else claimed.train()


@contextmanager
def _in_process_group(job: Job) -> Iterator[None]:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with process_group(job.timeout), job._saving_on_sigterm():
        yield
