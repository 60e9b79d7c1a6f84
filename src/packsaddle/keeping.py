"""A run that is kept along the way, and gone on with."""

import time
from functools import partial
from typing import Any

import torch

from packsaddle.checkpoint import restore, save_checkpoint
from packsaddle.checkpointfiles import CheckpointError
from packsaddle.parts import on_all
from packsaddle.preparation import Prepared
from packsaddle.runfolder import RunFolder
from packsaddle.saving import Saving
from packsaddle.schema import ConfigError
from packsaddle.skips import NonFiniteError
from packsaddle.together import Together

CHECKPOINTS = "checkpoint"  # the folder in a run's folder
STOPPED = "stopped.json"  # is there while a run is stopped that was told to
NEVER = Saving(every=0)


class LoadingError(CheckpointError):
    """No worker can go on from the checkpoints there are, for a reason that all know."""


class Kept(Prepared):
    """One worker's side of a run, with checkpoints."""

    def _given_up(self, error: NonFiniteError, folder: RunFolder, saving: Saving) -> NonFiniteError:
        """Keep what there was before, when a run cannot go on; return what to say."""
        if not saving.on:
            return error
        self.optimizer.guard.skips.took()  # who goes on may have mended it
        self._save(folder)
        return NonFiniteError(f"{error} A checkpoint of step {self.tally.step} is kept; to go on: {saving.hint}")

    def _save(self, folder: RunFolder) -> float:
        """Save a checkpoint; return the seconds it took."""
        before, tally = time.perf_counter(), self.tally
        if self.group.rank == 0:
            folder.settle()
        extra: dict[str, Any] = {"tally": tally.state_dict(), "history": [list(pair) for pair in self.history]}
        extra |= {
            "warnings": self.warnings,
            "inspected": self.inspector.seconds,
            "sums": tally.sums,
            "final": tally.final,
        }
        save_checkpoint(
            folder.path / CHECKPOINTS, self._parts(), step=tally.step, extra=extra, process_group=self._own_group()
        )
        seconds = time.perf_counter() - before
        tally.saved += seconds
        return seconds

    def _resume(self, folder: RunFolder, *, quiet: bool) -> None:
        """Go on from the newest checkpoint, if there is one, with what has been recorded since cut off."""
        try:
            found = restore(folder.path / CHECKPOINTS, self._parts(), process_group=self._own_group())
            if found is not None and found.step >= 0:
                self.tally.load_state_dict(found.extra["tally"], found.extra["sums"], found.extra["final"])
                self.inspector.seconds, self.warnings = found.extra["inspected"], found.extra["warnings"]
                self._continue([(step, workers) for step, workers in found.extra["history"]], found.step)
            on_all(Together(self._own_group(), torch.device("cpu")), partial(self._cut, folder))
        except CheckpointError as error:
            raise LoadingError(str(error)) from error
        notes = () if found is None else found.notes
        if not quiet:
            where = f"goes on from step {self.tally.step} of {self.calendar.steps}" if self.tally.step else "begins"
            print("\n".join([*notes, f"{folder.path}: {where}"]), flush=True)

    def _cut(self, folder: RunFolder) -> None:
        if self.group.rank == 0:
            try:
                folder.cut(self.tally.step)
                folder.remove(STOPPED)
            except (ConfigError, OSError) as error:
                raise CheckpointError(str(error)) from error

    def _continue(self, history: list[tuple[int, int]], step: int) -> None:
        """Have the past that a checkpoint tells of, and from here on this number of workers."""
        size = self.group.size
        self.history = history if history[-1][1] == size else [*history, (step, size)]
        if len(self.history) == 1:
            return
        if self.config.certify is not None:
            raise CheckpointError(
                f"a run with [certify] cannot go on with {size} workers, having begun with {history[-1][1]}: the steps "
                f"that it certifies were counted for those"
            )
        self._plan()
        if self._schedule and self._ramp:
            self._schedule.ramp = self._ramp

    def _say_stopped(self, folder: RunFolder, saving: Saving, *, quiet: bool) -> None:
        self._own_group().all_reduce(torch.zeros(1))  # all have saved
        if self.group.rank == 0:
            step, hint = self.tally.step, saving.hint
            folder.write_json(STOPPED, {"step": step, "of": self.calendar.steps, "resume": hint})
            if not quiet:
                print(f"stopped at step {step} of {self.calendar.steps}; to go on: {hint}", flush=True)
