"""The schedule of exchanges of local updates. This module contains all arithmetic on numbers of inner steps."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Event:
    """The beginning or the end of an exchange of one fragment, i.e. of parameters that are exchanged together."""

    begins: bool  # True: an exchange begins; False: the running exchange, if any, ends
    fragment: int  # index of the fragment
    tick: int  # the time at which the event is due, in ticks (see `Schedule`); identical on all workers


@dataclass(frozen=True)
class Schedule:
    """The schedule of exchanges: after which inner steps each fragment (part of the model) is exchanged. A schedule is
    immutable. Steps are counted from 1.

    Time is counted in ticks, so that it is identical on workers that make different numbers of inner steps. A round has
    `every` ticks. A worker makes `pace` inner steps in a round, and spreads them evenly over the ticks. An exchange of
    fragment i begins at each tick n with (n + offsets[i]) % every = 0, and ends `delay` ticks later. On each worker, an
    exchange begins or ends after the first inner step that reaches the tick.

    Workers that join and leave during training do not use ticks: they have a round every `period` steps. They exchange
    one fragment in each round, in rotation.
    """

    every: int
    delay: int
    offsets: tuple[int, ...]  # offset of each fragment in a round, in ticks, below `every`
    pace: int | None = None  # inner steps of this worker in a round; None: `every`, so a step advances by one tick
    since: int = 0  # number of inner steps after which `pace` is valid
    origin: int = 0  # the tick that this worker has reached after `since` inner steps

    def tick(self, step: int) -> int:
        """Return the time after this worker's inner step number `step`, in ticks, of which a round has `every`."""
        return self.origin + (step - self.since) * self.every // (self.pace or self.every)

    def paced(self, pace: int, step: int) -> "Schedule":
        """Return a copy of this schedule in which this worker makes `pace` inner steps in a round after inner step
        number `step`."""
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
        return [i for i, offset in enumerate(self.offsets) if (tick + offset) % self.every == 0]

    @property
    def period(self) -> int:
        """The number of inner steps from one round to the next, at least 1, if workers join and leave during
        training."""
        return max(1, self.every // len(self.offsets))

    def in_rotation(self, rounds: int) -> int:
        """Return the index of the fragment (part of the model) that is exchanged after `rounds` applied rounds, if
        workers join and leave during training: each round then exchanges one fragment, in rotation."""
        return rounds % len(self.offsets)


def offsets(every: int, parts: int) -> list[int]:
    """Return an offset for each of `parts` fragments (parts of the model that are exchanged separately): the number of
    steps before the end of a round of `every` steps at which the fragment's exchange begins. The exchanges of
    consecutive fragments are about every / parts steps apart."""
    return [i * every // parts for i in range(parts)]
