"""Paces: the number of inner steps of each worker in a round, such that workers of different speeds end it together.

The sum of the paces of W workers is W times the pace of equally fast workers, which is `every` for a fixed set of
workers. So a round trains on as many examples as with equal paces, and the number of bytes per example does not change.
A worker that is faster than the others makes more steps in a round than it would with equal paces, and a slower worker
makes fewer.
"""

import heapq
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from packsaddle.numerics.transfers import to_host

# Threshold of a change of speed: a worker's speed has changed if its fraction of the sum of all workers' speeds has
# changed by more than this, relative to the fraction when the paces were chosen.
_TOLERANCE = 0.1
_ROUNDS = 2  # number of consecutive rounds with changed speeds after which the numbers of steps are chosen anew


def paces(times: Sequence[int], total: int) -> list[int]:
    """Return the number of inner steps of each worker in a round, at least 1, such that the workers make `total` steps
    together, and the last of them ends the round as early as possible.

    `times` has the time of a step of each worker, by rank, as positive integers, so that all workers compute the same
    result.
    """
    steps = [1] * len(times)
    # For each worker, the time at which it would end the round if it made one more step, and its rank.
    ends = [(2 * t, i) for i, t in enumerate(times)]
    heapq.heapify(ends)
    for _ in range(total - len(steps)):
        _, i = ends[0]
        steps[i] += 1
        heapq.heapreplace(ends, ((steps[i] + 1) * times[i], i))
    return steps


@dataclass
class Pacing:
    """The paces of a fixed set of workers, i.e. their numbers of inner steps in a round. Lists are by rank, and
    identical on all workers."""

    steps: list[int]  # paces in this round
    following: list[int]  # paces in the next round; equal to `steps` unless they were just chosen anew
    times: list[int]  # nanoseconds per step of each worker when the paces were chosen; 1 for all: not measured
    changed: int = 0  # number of consecutive rounds in which the relative speeds differed from those of `times`

    @classmethod
    def of(cls, fixed: Iterable[int] | None, workers: int, every: int) -> "Pacing":
        """Return the paces in `fixed`, i.e. each worker's number of inner steps in a round. If `fixed` is None, all
        paces are `every`. Raises ValueError unless `fixed` has one pace for each worker."""
        steps = [every] * workers if fixed is None else list(fixed)
        if len(steps) != workers:
            raise ValueError(f"steps must have a number for each of the {workers} workers, got {len(steps)} numbers")
        return cls(steps, steps, [1] * workers)

    def measure(self, times: Sequence[int]) -> None:
        """Choose the workers' numbers of steps in the next round anew if a worker's speed in two consecutive rounds
        differed from its speed when the numbers were chosen last. `times` are the mean nanoseconds of each worker's
        step in this round.

        No-op if one of the times is 0, i.e. unknown, or if there are no times.
        """
        if not times or not all(times):
            return
        pairs = zip(_parts(times), _parts(self.times), strict=True)
        self.changed = self.changed + 1 if any(abs(now / then - 1) > _TOLERANCE for now, then in pairs) else 0
        if self.changed == _ROUNDS:
            self.following, self.times, self.changed = paces(times, sum(self.steps)), list(times), 0


def _parts(times: Sequence[int]) -> list[float]:
    """Return each worker's fraction of the sum of all workers' speeds. The speed of
    a worker is 1 / the time of its step."""
    total = sum(1 / t for t in times)
    return [1 / t / total for t in times]


class StepClock:
    """Measures the time of this worker's inner steps, without the time of exchanges.

    The caller counts the steps since the last reading in `steps`. At the beginning and the end of `paused`, the context
    in which exchanges run, the host waits until `device` has no more work. If `device` is None, nothing is measured.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._last = None if device is None else torch.zeros(1, device=device)
        self.steps, self._seconds, self._resumed = 0, 0.0, self._now()

    def _now(self) -> float:
        if self._last is None:
            return 0.0
        to_host(self._last)  # waits for the device
        return time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._seconds += self._now() - self._resumed
        yield
        self._resumed = self._now()

    def read(self) -> int:
        """Return the mean time of an inner step since the last call of this method, in nanoseconds, or 0 if there was
        no step or nothing is measured. Call within `paused`."""
        found = round(1e9 * self._seconds / self.steps) if self.steps else 0
        self.steps, self._seconds = 0, 0.0
        return found
