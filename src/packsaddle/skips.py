"""The steps that were not taken, since gradients were not finite: counted, logged, and too many of them an error."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from packsaddle.wording import numbered

_log = logging.getLogger("packsaddle")


class GuardError(RuntimeError):
    """A run cannot go on as it is, on any of its workers; the message says why."""


class NonFiniteError(GuardError):
    """Too many steps in a row had a gradient that is not finite. What was there before the first of them still is."""


@dataclass(frozen=True)
class Skip:
    """A step that was not taken."""

    step: int  # t, which the next step has again
    workers: tuple[int, ...]  # whose gradients were not finite, as far as is known here
    parameter: str  # the first whose gradient was not, on the first of them

    def __str__(self) -> str:
        where = f" on {numbered('worker', self.workers)}" if self.workers else ""
        return f"step {self.step}: {self.parameter} is not finite{where}"


class Skips:
    """The steps that this worker knows of, at most `most` in a row; None: any number. Raises ValueError if negative."""

    def __init__(self, most: int | None, rank: int) -> None:
        if most is not None and most < 0:
            raise ValueError(f"max_skipped must be 0 or more steps, or None, got {most}")
        self.most, self._rank = most, rank
        self.list: list[Skip] = []  # since it was made or loaded
        self.count = self.in_a_row = 0

    def enter(self, skip: Skip) -> None:
        """Count a step, and log it on the first of the workers that it is due to; in a row, the 1st, 2nd, 4th, ..."""
        self.list.append(skip)
        self.count += 1
        self.in_a_row += 1
        is_mine = skip.workers[:1] == (self._rank,) or (not skip.workers and self._rank == 0)
        if is_mine and self.in_a_row & (self.in_a_row - 1) == 0:
            row = f" ({self.in_a_row} in a row)" if self.in_a_row > 1 else ""
            _log.warning("%s; the step is left out%s", skip, row)

    def took(self) -> None:
        """Know that a step was taken."""
        self.in_a_row = 0

    def check(self, in_a_row: int) -> None:
        """Raise NonFiniteError if that is too many; the last is the one to be named."""
        if self.most is not None and in_a_row > self.most:
            raise NonFiniteError(
                f"{self.list[-1]}: {in_a_row} in a row could not be taken, and max_skipped={self.most}; parameters, "
                f"error memories and step count are as before. Is the learning rate too high, or the data bad?"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {"skipped": self.count, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts."""
        self.count, self.in_a_row, self.list = state.get("skipped", 0), state.get("in_a_row", 0), []
