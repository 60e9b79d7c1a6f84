"""The checkpoints of a run: their schedule and files, stopping and resuming."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lab.runs.config import Config, first_difference
from lab.runs.run_folder import RunFolder
from packsaddle.checkpoint.atomic_files import PARTIAL
from packsaddle.checkpoint.files import CheckpointError
from packsaddle.checkpoint.parts import run_on_all
from packsaddle.checkpoint.save_load import Checkpoint, remove_all, restore, save_checkpoint, steps_in
from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.group import Group
from packsaddle.comm.launching import asked_to_stop
from packsaddle.errors import ConfigError
from packsaddle.options.schema import build, plain

_SECONDS = 30.0  # minimum seconds between checkpoints, if `CheckpointPolicy.every` is None
# The value of a vote to stop. A vote to save is 1, and only rank 0 votes to save, so the sum of all votes, which is
# exact in float32, shows both.
_STOP = 1024.0
# Minimum time between checkpoints, in units of the last save's duration, so that saving takes at most 2% of a run.
_COSTS = 50


@dataclass(frozen=True)
class CheckpointPolicy:
    """The schedule of a run's checkpoints. If `stops` is False, workers do not vote, and every=None means one epoch."""

    every: int | None = None  # steps between checkpoints; None: about an epoch, at least 30 s; 0: no checkpoints
    resume: bool = False  # restore the newest checkpoint in the folder
    stops: bool = True  # on SIGTERM, save a checkpoint and stop
    hint: str = ""  # the command that resumes a stopped run

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise ValueError(f"checkpoint-every must be 0 or more steps, got {self.every}")

    @property
    def on(self) -> bool:
        return self.every != 0


NEVER = CheckpointPolicy(every=0)


class StopAndSaveVote:
    """Collective decision to save a checkpoint or to stop, at the same step on all workers.

    The votes of all workers are averaged in a step's exchange. Only worker 0 votes to save, by its own clock.
    """

    def __init__(self, saving: CheckpointPolicy, per_epoch: int, rank: int, workers: int, step: int) -> None:
        self._saving, self._per_epoch, self._rank, self._workers = saving, per_epoch, rank, workers
        self._saved, self._since, self._cost = step, time.monotonic(), 0.0

    def scalars(self, step: int) -> Tensor | None:
        """Return this worker's vote to save or stop, float[1], which the exchange of step `step` averages.

        Returns None if there is no vote, since saving or stopping is off.
        """
        if not (self._saving.on and self._saving.stops):
            return None
        may_save = self._rank == 0 and self._saving.every is None and step + 1 - self._saved >= self._per_epoch
        due = may_save and time.monotonic() - self._since >= max(_SECONDS, _COSTS * self._cost)
        return torch.tensor([_STOP * asked_to_stop() + due])

    def decide(self, steps: int, means: Tensor | None) -> tuple[bool, bool]:
        """Return the decision (save, stop) after `steps` steps, from the mean of the votes.

        `means` is None after a step without an exchange. Then only the number of steps decides.
        """
        if not self._saving.on:
            return False, False
        total = round(float(means[0]) * self._workers) if self._saving.stops and means is not None else 0
        stop, due = total >= _STOP, total % _STOP > 0
        every = self._saving.every
        if every is None and not self._saving.stops:
            every = self._per_epoch
        if every is not None:
            due = steps // every > self._saved // every
        return due or stop, stop

    def saved(self, steps: int, seconds: float) -> None:
        self._saved, self._since, self._cost = steps, time.monotonic(), seconds


CHECKPOINTS = "checkpoint"  # name of the folder in a run's folder
FINAL_WEIGHTS = f"{CHECKPOINTS}/model.pt"  # file written after the last step, before checkpoints are removed
STOPPED = "stopped.json"  # file that exists after a run was stopped by SIGTERM, until it is resumed


class LoadingError(CheckpointError):
    """The checkpoints cannot be restored. Raised on all workers with the same message."""


class RunCheckpoints:
    """The checkpoints in a run's folder. Every method is collective in `group`, the processes that write files."""

    def __init__(self, folder: RunFolder, policy: CheckpointPolicy, parts: Mapping[str, Any], group: Group) -> None:
        self.policy = policy
        self._folder, self._path, self._parts, self._group = folder, folder.path / CHECKPOINTS, parts, group

    def save(self, step: int, extra: Mapping[str, Any]) -> float:
        before = time.perf_counter()
        if self._group.rank == 0:
            self._folder.flush()
        save_checkpoint(self._path, self._parts, step=step, extra=extra, process_group=self._group)
        return time.perf_counter() - before

    def resume(self, load: Callable[[Checkpoint], None]) -> tuple[str, ...]:
        """Restore the parts from the newest checkpoint, if there is one, and truncate the recorded metrics to its step.

        `load` is called with the checkpoint, to restore all state that is not in the parts. Returns notes for the user.
        Raises LoadingError.
        """
        try:
            found = restore(self._path, self._parts, process_group=self._group)
            step = 0
            if found is not None and found.step >= 0:
                load(found)
                step = found.step
            run_on_all(ObjectCollectives(self._group, torch.device("cpu")), partial(self._cut, step))
        except CheckpointError as error:
            raise LoadingError(str(error)) from error
        return () if found is None else tuple(found.notes)

    def _cut(self, step: int) -> None:
        if self._group.rank == 0:
            try:
                self._folder.cut(step)
                (self._folder.path / STOPPED).unlink(missing_ok=True)
            except (ConfigError, OSError) as error:
                raise CheckpointError(str(error)) from error

    def record_stop(self, step: int, steps: int, *, quiet: bool) -> None:
        """Write stopped.json and print how to resume the run. Call after `save`.

        `step` is the number of steps done, `steps` that of the whole run.
        """
        if self._group.rank == 0:
            hint = self.policy.hint
            self._folder.write_json(STOPPED, {"step": step, "of": steps, "resume": hint})
            if not quiet:
                print(f"stopped at step {step} of {steps}; to resume: {hint}", flush=True)

    def remove(self) -> None:
        remove_all(self._path)


State = Literal["new", "begun", "done"]


def find(path: Path, config: Config | None) -> tuple[Config, State]:
    """Return the configuration and state of the run in a folder.

    `config` is the configuration given to the command, or None. Raises ConfigError if the folder is not a run folder,
    or if the two configurations differ in more than the number of workers.
    """
    state = state_of(path)
    if state == "new":
        if config is None:
            raise ConfigError(f"--resume: {path} is not a run folder (it has no config.json); to start one, add CONFIG")
        return config, state

    # Once a run has begun, its folder contains the configuration.
    file = path / "config.json"
    try:
        saved = build(Config, json.loads(file.read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {file} cannot be read: {error}") from None
    if config is not None and (different := first_difference(plain(config), plain(saved))) is not None:
        key, ours, theirs = different
        raise ConfigError(f"--resume: {key} is {ours!r} in CONFIG, but {theirs!r} in {file}")
    return saved, state


def state_of(path: Path) -> State:
    """Return the state of the run in a folder. Raises ConfigError if the folder contains files but no run."""
    if (path / "config.json").is_file():
        if (path / "summary.json").is_file():
            return "done"
        if (path / FINAL_WEIGHTS).is_file() and not steps_in(path / CHECKPOINTS):
            raise ConfigError(
                f"--resume: {path} has the weights of a finished run ({FINAL_WEIGHTS}), but no summary.json, and a new "
                f"start would overwrite its results; put summary.json back, or train in another folder"
            )
        return "begun"
    others = [p.name for p in path.iterdir() if not p.name.endswith(PARTIAL)] if path.is_dir() else []
    if others or (path.exists() and not path.is_dir()):
        raise ConfigError(f"--resume: {path} is not a run folder (it has no config.json), and is not empty")
    return "new"
