"""When exchanges of local updates run: all arithmetic on numbers of inner steps.

`Schedule` is for a fixed set of workers, and `Rotation` for workers that join and leave. `paces` and `Pacing` choose
each worker's number of inner steps in a round, such that workers of different speeds end it together. The sum of the
paces of W workers is W times the pace of equally fast workers. So a round trains on as many examples as with equal
paces, and the number of bytes per example does not change.
"""

import heapq
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from packsaddle.numerics.devices import to_host

# H, the number of inner steps in a round: a constant, or a function of the number of steps before the round, from 0 on.
Every = int | Callable[[int], int]
_COMPARED = 100  # number of the first rounds whose lengths are compared if `every` is a function


@dataclass(frozen=True)
class Event:
    """The beginning or the end of an exchange of one fragment, i.e. of parameters that are exchanged together."""

    begins: bool  # True: an exchange begins; False: the running exchange, if any, ends
    fragment: int  # index of the fragment
    tick: int  # the time at which the event is due, in ticks (see `Schedule`); identical on all workers


@dataclass(frozen=True)
class Progress:
    """The state of a `Schedule` in a saved state."""

    pace: int | None  # see `Schedule`
    since: int
    origin: int
    step: int  # the worker's inner steps
    round_start: int  # the tick after which the current round began


@dataclass(frozen=True)
class Schedule:
    """The schedule of exchanges: after which inner steps each fragment (part of the model) is exchanged. A schedule is
    immutable. Steps are counted from 1.

    Time is counted in ticks, so that it is identical on workers that make different numbers of inner steps. A round has
    H ticks. A worker makes `pace` inner steps in a round, and spreads them evenly over the ticks. In a round that ends
    at tick n, the exchange of a fragment in slot i of `of` begins at tick n - i * H // of, and ends `delay` ticks
    later. On each worker, an exchange begins or ends after the first inner step that reaches the tick.

    If `every` is a function, each call of a method raises ValueError once the function returns an H that is no integer,
    or is too small for the delay and the number of slots.
    """

    every: Every  # H, or a function of the number of ticks before the round that returns H
    delay: int = 0
    slots: tuple[int, ...] = (0,)  # slot of each fragment, below `of`; slot 0 is the end of a round
    of: int = 1  # number of slots
    # Inner steps of this worker in a round; None: one in each tick. It is None if `every` is a function.
    pace: int | None = None
    since: int = 0  # number of inner steps after which `pace` is valid
    origin: int = 0  # the tick that this worker has reached after `since` inner steps
    # The ticks after which the rounds so far began, if `every` is a function. The list grows as it is needed.
    _starts: list[int] = field(default_factory=lambda: [0], compare=False, repr=False)

    def tick(self, step: int) -> int:
        """Return the time after this worker's inner step number `step`, in ticks, of which a round has H."""
        ahead = step - self.since
        return self.origin + (ahead if self.pace is None else ahead * self._constant // self.pace)

    def paced(self, pace: int, step: int) -> "Schedule":
        """Return a copy of this schedule in which this worker makes `pace` inner steps in a round after inner step
        number `step`. Only for an `every` that is a number."""
        return replace(self, pace=pace, since=step, origin=self.tick(step))

    def after(self, step: int) -> list[Event]:
        """Return the beginnings and ends of exchanges that are due after this worker's inner step number `step`, in the
        order in which they must run. Without a delay, each exchange ends before the next one begins. With a delay,
        exchanges that end at a tick come before those that begin at it."""
        before = max(0, self.tick(step - 1))
        return [event for tick in range(before + 1, self.tick(step) + 1) for event in self._at(tick)]

    def _at(self, tick: int) -> list[Event]:
        begun = self._begun(tick)
        if not self.delay:
            return [Event(begins, i, tick) for i in begun for begins in (True, False)]
        ended = self._begun(tick - self.delay) if tick > self.delay else []
        return [Event(False, i, tick) for i in ended] + [Event(True, i, tick) for i in begun]

    def _begun(self, tick: int) -> list[int]:
        start, every = self.round_at(tick)
        return [i for i, slot in enumerate(self.slots) if tick == start + every - slot * every // self.of]

    def ends_round(self, tick: int) -> bool:
        """Return True if a round ends at `tick`, at least 1."""
        return tick == sum(self.round_at(tick))

    def round_at(self, tick: int) -> tuple[int, int]:
        """Return the round that contains `tick`, at least 1: the tick after which it began, and its length H."""
        if not callable(self.every):
            return (tick - 1) // self.every * self.every, self.every
        starts = self._starts
        while starts[-1] < tick:
            starts.append(starts[-1] + self._length(self.every, starts[-1]))
        i = bisect_left(starts, tick)
        return starts[i - 1], starts[i] - starts[i - 1]

    def _length(self, every: Callable[[int], int], start: int) -> int:
        found, least = every(start), max(1, self.of, self.delay + 1)
        if isinstance(found, bool) or not isinstance(found, int) or found < least:
            raise ValueError(
                f"every must return an integer of at least {least} (1, the number of fragments, the delay + 1), got "
                f"{found!r} for the round after step {start}"
            )
        return found

    @property
    def _constant(self) -> int:
        assert not callable(self.every)
        return self.every

    def periods(self) -> int | list[int]:
        """Return what identifies `every`, as plain types: H, or the lengths of the first 100 rounds."""
        if not callable(self.every):
            return self.every
        found, tick = list[int](), 1
        for _ in range(_COMPARED):
            start, every = self.round_at(tick)
            found.append(every)
            tick = start + every + 1
        return found

    def progress(self, step: int) -> Progress:
        """Return the state of this schedule after this worker's inner step number `step`."""
        return Progress(self.pace, self.since, self.origin, step, self.round_at(self.tick(step) + 1)[0])

    def check(self, saved: Progress) -> None:
        """Raise ValueError if `saved` is not the progress of a schedule with this `every`."""
        start = self.round_at(self.resumed(saved).tick(saved.step) + 1)[0]
        if start != saved.round_start:
            raise ValueError(
                f"every must return the same numbers as when the state was saved: the round at step {saved.step} "
                f"begins after step {start} here, and began after step {saved.round_start} there"
            )

    def resumed(self, saved: Progress) -> "Schedule":
        return replace(self, pace=saved.pace, since=saved.since, origin=saved.origin)


@dataclass(frozen=True)
class Rotation:
    """The schedule of a worker in a run whose workers join and leave: a round after every `pace` inner steps, which
    exchanges one fragment (part of the model), in rotation. It is immutable."""

    every: int  # H, the inner steps from one exchange of a fragment to the next, of equally fast workers
    fragments: int  # number of fragments
    own: int | None = None  # inner steps of this worker between two rounds; None: `period`

    @property
    def period(self) -> int:
        """The number of inner steps between two rounds, of equally fast workers."""
        return max(1, self.every // self.fragments)

    @property
    def pace(self) -> int:
        return self.period if self.own is None else self.own

    def is_due(self, ahead: int) -> bool:
        """Return True if a round is due after `ahead` inner steps since the last round."""
        return ahead >= self.pace

    def fragment(self, rounds: int) -> int:
        """Return the index of the fragment that is exchanged after `rounds` applied rounds."""
        return rounds % self.fragments


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
    every: int  # pace of equally fast workers
    changed: int = 0  # number of consecutive rounds in which the relative speeds differed from those of `times`

    @classmethod
    def of(cls, fixed: Iterable[int] | None, workers: int, every: int) -> "Pacing":
        """Return the paces in `fixed`, i.e. each worker's number of inner steps in a round. If `fixed` is None, all
        paces are `every`. Raises ValueError unless `fixed` has one pace for each worker."""
        steps = [every] * workers if fixed is None else list(fixed)
        if len(steps) != workers:
            raise ValueError(f"steps must have a number for each of the {workers} workers, got {len(steps)} numbers")
        return cls(steps, steps, [1] * workers, every)

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
    """Return each worker's fraction of the sum of all workers' speeds. The speed of a worker is 1 / the time of its
    step."""
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
