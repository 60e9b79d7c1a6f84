"""The schedule of exchanges of local updates. This module contains all arithmetic on numbers of inner steps."""

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Event:
    """The begin or the end of an exchange of one fragment, after an inner step."""

    begins: bool  # True: an exchange begins; False: the running exchange, if any, ends
    fragment: int  # index of the fragment
    tick: int  # the tick at which the event is due, identical on all workers


@dataclass(frozen=True)
class Schedule:
    """The inner steps after which each fragment is exchanged. It is immutable; steps are counted from 1.

    Time is counted in ticks, `every` in a round, which are identical on all workers. A worker makes `pace` inner steps
    in a round, spread evenly over its ticks. An exchange of fragment i begins at each tick n with
    (n + offsets[i]) % every = 0, and ends `delay` ticks later. It begins or ends after the first inner step that
    reaches the tick.
    Workers that join and leave exchange one fragment in each round, in rotation, and a round every `period` steps.
    """

    every: int
    delay: int
    offsets: tuple[int, ...]  # offset of each fragment in a round, in ticks, below `every`
    pace: int | None = None  # inner steps of this worker in a round; None: `every`, so each step is a tick
    since: int = 0  # the inner step after which the pace began
    origin: int = 0  # the tick that inner step `since` reached

    def tick(self, step: int) -> int:
        """Return the tick (see the class) that this worker has reached after its inner step number `step`."""
        return self.origin + (step - self.since) * self.every // (self.pace or self.every)

    def paced(self, pace: int, step: int, *, idle: int = 0) -> "Schedule":
        """Return this schedule with another pace, which begins after inner step number `step`. The tick does not
        advance in the next `idle` steps."""
        return replace(self, pace=pace, since=step + idle, origin=self.tick(step))

    def after(self, step: int) -> list[Event]:
        """Return the events after inner step number `step`, in order. Without a delay, each exchange ends before the
        next one begins."""
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

    def next_begin(self, step: int) -> int:
        """Return the tick of the first exchange that begins after inner step number `step`."""
        tick = self.tick(step)
        return tick + min(self.every - (tick + offset) % self.every for offset in self.offsets)

    @property
    def period(self) -> int:
        """The number of inner steps from one round of elastic workers to the next, at least 1."""
        return max(1, self.every // len(self.offsets))

    def in_rotation(self, rounds: int) -> int:
        """Return the index of the fragment that elastic workers exchange after `rounds` applied rounds."""
        return rounds % len(self.offsets)


def offsets(every: int, parts: int) -> list[int]:
    """Return the offset of each fragment in the schedule of a round, in steps. Consecutive ones of the `parts`
    fragments are exchanged every / parts steps apart."""
    return [i * every // parts for i in range(parts)]
