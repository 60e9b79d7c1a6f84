"""Jobs: configured runs, and the workers that do them, as processes or simulated."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch

import packsaddle
from packsaddle.choose import choose
from packsaddle.collectives import RingAllReduce
from packsaddle.config import Config
from packsaddle.data import shard
from packsaddle.exchange import Solo, ambient_group, launch, process_group, resolve
from packsaddle.runfolder import environment, make_new, written
from packsaddle.schema import ConfigError, plain
from packsaddle.simulate import FusedGroup, simulate
from packsaddle.trackers import TrackerName, require_tracker, tracked
from packsaddle.training import Training

# How W workers are had: as processes, one after the other in this process, or as one that holds their mean.
How = Literal["processes", "serial", "fused"]


def can_be_fused(config: Config) -> bool:
    """Whether all that a run's workers exchange is means, at points that are the same (see `FusedGroup`)."""
    if config.local_steps > 1:
        return False
    try:
        choice = choose(config.compressor, config.exchange, d=1 << 20, dense=1, workers=max(2, config.workers))
    except ValueError:  # also for a compressor that does not know its tensors yet
        return False
    wires = choice.protocol.collectives(1 << 20, 1, max(2, config.workers), 4)
    return all(isinstance(wire, RingAllReduce) for wire in wires)


@dataclass(frozen=True)
class Job:
    """Runs to do one after the other with the same workers, each into its own new folder."""

    configs: tuple[Config, ...]
    folders: tuple[Path, ...]
    data_dir: Path | None = None
    download: bool = False
    quiet: bool = False
    track: tuple[TrackerName, ...] = ()  # rank 0's numbers go there too
    timeout: timedelta | None = None  # of a collective of worker processes; by default torch's

    def check(self, workers: int, how: How = "processes") -> None:
        """Raise ConfigError for whatever would stop a worker at its start; in one process, before any is launched."""
        if how == "fused":
            self._check_fusable()
        for name in self.track:
            require_tracker(name)
        for config in self.configs:
            training = Training(config, self.data_dir, self.download)
            for worker in range(workers):
                shard(training.data, config.data.shard, worker=worker, workers=workers, seed=config.seed)

    def claim(self) -> None:
        """Check the job and make the folders, on rank 0; collective. If that fails, every worker stops: rank 0
        with a ConfigError, the others with exit code 2."""
        group, problem = resolve(None), None
        if group.rank == 0:
            try:
                with ambient_group(Solo()):  # the check makes optimizers, which are collective
                    self.check(group.size)
                for folder in self.folders:
                    make_new(folder)
            except ConfigError as error:
                problem = error
        failed = torch.tensor([float(problem is not None)])
        group.broadcast(failed)
        if problem is not None:
            raise problem
        if failed:
            raise SystemExit(2)

    def train(self) -> None:
        """Do the runs in the present group (see `exchange.resolve`); collective."""
        for config, path in zip(self.configs, self.folders, strict=True):
            training = Training(config, self.data_dir, self.download)
            is_first = training.group.rank == 0
            with (
                written(path),
                tracked(path, self.track if is_first else (), config.label or path.name, plain(config)) as folder,
            ):
                if is_first:
                    device, size = str(training.device), training.group.size
                    folder.write_json("config.json", plain(config))
                    folder.write_json("environment.json", environment(packsaddle.__version__, size, device))
                training.run(folder, quiet=self.quiet)

    def run(self, workers: int, how: How) -> None:
        """Do the runs with `workers` workers. Raises ConfigError if they cannot be fused and are to be."""
        if workers == 1:
            self.train()
        elif how == "serial":
            simulate(lambda rank: self.train(), workers)
        elif how == "fused":
            self._check_fusable()
            with ambient_group(FusedGroup(workers)):
                self.train()
        else:
            launch(train_in_process_group, (self,), workers)

    def _check_fusable(self) -> None:
        for config in self.configs:
            if not can_be_fused(config):
                if config.local_steps > 1:
                    raise ConfigError("a fused simulation has one x, so it has no local_steps; use --serial")
                raise ConfigError(
                    f"a fused simulation needs workers that exchange means alone, but "
                    f"{type(config.compressor).__name__} by exchange {config.exchange!r} sends more; use --serial"
                )


def train_in_process_group(job: Job, claim: bool = False) -> None:
    """`Job.train`, after `Job.claim` if asked for, in a process that a launcher started."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    with process_group(job.timeout):
        if claim:
            job.claim()
        job.train()
