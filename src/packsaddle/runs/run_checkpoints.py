"""The checkpoints of a run: when one is saved, what its folder keeps, and how a run stops and resumes.

When to save or stop is agreed on where workers exchange. A folder that is given again is compared with the
configuration before its run resumes.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from packsaddle.checkpoint.atomic_files import PARTIAL
from packsaddle.checkpoint.files import CheckpointError, remove_all, steps_in
from packsaddle.checkpoint.parts import on_all
from packsaddle.checkpoint.save_load import Checkpoint, restore, save_checkpoint
from packsaddle.comm.communicator import Together
from packsaddle.comm.group import Group
from packsaddle.comm.launching import asked_to_stop
from packsaddle.errors import ConfigError
from packsaddle.options.schema import build, first_difference, plain
from packsaddle.runs.config import Config
from packsaddle.runs.folder_lock import LOCK
from packsaddle.runs.run_folder import RunFolder

_SECONDS = 30.0  # between checkpoints at least, where no number of steps is given
_STOP = 1024.0  # more than all workers' other wishes together, and exact in single precision
_COSTS = 50  # times as long as saving the last one took, too: so saving takes at most 2% of a run


@dataclass(frozen=True)
class CheckpointPolicy:
    """The interval of a run's checkpoints: N steps; None: about an epoch, at least half a minute; 0: none.

    Where a run does not `stop` on SIGTERM nothing need be agreed on, and None is every epoch.
    """

    every: int | None = None
    resume: bool = False  # go on from what the folder has
    stops: bool = True
    hint: str = ""  # the command that resumes a stopped run

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 0:
            raise ValueError(f"checkpoint-every must be 0 or more steps, got {self.every}")

    @property
    def on(self) -> bool:
        """True if there are checkpoints."""
        return self.every != 0


NEVER = CheckpointPolicy(every=0)


class StopAndSaveVote:
    """Collective decision to save a checkpoint or to stop, taken at the same step on all workers.

    The votes of all are averaged where they exchange; the clock that counts is worker 0's.
    """

    def __init__(self, saving: CheckpointPolicy, per_epoch: int, rank: int, workers: int, step: int) -> None:
        self._saving, self._per_epoch, self._rank, self._workers = saving, per_epoch, rank, workers
        self._saved, self._since, self._cost = step, time.monotonic(), 0.0

    def scalars(self, step: int) -> Tensor | None:
        """Return this worker's vote in step `step`, float[1], or None if no worker ever votes."""
        if not (self._saving.on and self._saving.stops):
            return None
        due = self._rank == 0 and self._by_the_clock(step + 1)
        return torch.tensor([_STOP * asked_to_stop() + due])

    def _by_the_clock(self, steps: int) -> bool:
        if self._saving.every is not None or steps - self._saved < self._per_epoch:
            return False
        return time.monotonic() - self._since >= max(_SECONDS, _COSTS * self._cost)

    def heard(self, steps: int, means: Tensor | None) -> tuple[bool, bool]:
        """Return whether to save and whether to stop after a number of steps, from the means of the scalars; None
        after a step without an exchange, where there is saving by the number of steps alone."""
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
        """Know that a checkpoint was saved, and how long that took."""
        self._saved, self._since, self._cost = steps, time.monotonic(), seconds


CHECKPOINTS = "checkpoint"  # the folder in a run's folder
FINAL_WEIGHTS = f"{CHECKPOINTS}/model.pt"  # is there when the last step is done; the checkpoints of steps go later
STOPPED = "stopped.json"  # is there while a run is stopped that was told to


class LoadingError(CheckpointError):
    """No worker can go on from the checkpoints there are, for a reason that all know."""


class RunCheckpoints:
    """The checkpoints in a run's folder; every method is collective in `group`, those who have files."""

    def __init__(self, folder: RunFolder, policy: CheckpointPolicy, parts: Mapping[str, Any], group: Group) -> None:
        self.policy = policy
        self._folder, self._parts, self._group = folder, parts, group

    def save(self, step: int, extra: Mapping[str, Any]) -> float:
        """Save a checkpoint; return the seconds it took."""
        before = time.perf_counter()
        if self._group.rank == 0:
            self._folder.settle()
        save_checkpoint(self._path, self._parts, step=step, extra=extra, process_group=self._group)
        return time.perf_counter() - before

    def resume(self, load: Callable[[Checkpoint], None]) -> tuple[str, ...]:
        """Load the parts from the newest checkpoint, if there is one, and cut off what was recorded since.

        `load` takes over the rest of the checkpoint. Returns notes for the user. Raises LoadingError.
        """
        try:
            found = restore(self._path, self._parts, process_group=self._group)
            step = 0
            if found is not None and found.step >= 0:
                load(found)
                step = found.step
            on_all(Together(self._group, torch.device("cpu")), partial(self._cut, step))
        except CheckpointError as error:
            raise LoadingError(str(error)) from error
        return () if found is None else tuple(found.notes)

    def _cut(self, step: int) -> None:
        if self._group.rank == 0:
            try:
                self._folder.cut(step)
                self._folder.remove(STOPPED)
            except (ConfigError, OSError) as error:
                raise CheckpointError(str(error)) from error

    def say_stopped(self, step: int, steps: int, *, quiet: bool) -> None:
        """Record that the run was stopped at a step of its total, when all have saved, and say how to resume."""
        self._group.all_reduce(torch.zeros(1))  # all have saved
        if self._group.rank == 0:
            hint = self.policy.hint
            self._folder.write_json(STOPPED, {"step": step, "of": steps, "resume": hint})
            if not quiet:
                print(f"stopped at step {step} of {steps}; to go on: {hint}", flush=True)

    def remove(self) -> None:
        """Remove the checkpoints of a run that is done."""
        remove_all(self._path)

    @property
    def _path(self) -> Path:
        return self._folder.path / CHECKPOINTS


State = Literal["new", "begun", "done"]


def find(path: Path, config: Config | None) -> tuple[Config, State]:
    """Return a run's configuration, and how far it is. `config` is that of the command, if it has one.

    Raises ConfigError if the folder is something else, or has another configuration but for the number of workers.
    """
    state = state_of(path)
    if state == "new":
        if config is None:
            raise ConfigError(
                f"--resume: {path} is not a run folder (it has no config.json); to begin one, give CONFIG"
            )
        return config, state

    # A run that was begun has its configuration in its folder.
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
    """Return the progress of the run in a folder. Raises ConfigError if there is something else in it."""
    if (path / "config.json").is_file():
        if (path / "summary.json").is_file():
            return "done"
        if (path / FINAL_WEIGHTS).is_file() and not steps_in(path / CHECKPOINTS):
            raise ConfigError(
                f"--resume: {path} has the weights of a finished run ({FINAL_WEIGHTS}), but no summary.json, and a new "
                f"start would overwrite its results; put summary.json back, or train in another folder"
            )
        return "begun"
    others = (
        [p.name for p in path.iterdir() if p.name != LOCK and not p.name.endswith(PARTIAL)] if path.is_dir() else []
    )
    if others or (path.exists() and not path.is_dir()):
        raise ConfigError(f"--resume: {path} is not a run folder (it has no config.json), and not empty")
    return "new"
