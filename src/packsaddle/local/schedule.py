"""The schedule of exchanges of local updates: all arithmetic of inner steps."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Event:
    """The begin or the end of an exchange of one fragment, after an inner step."""

    begins: bool  # False: it ends, if one is running
    fragment: int  # index of the fragment


@dataclass(frozen=True)
class Schedule:
    """The inner steps after which each fragment is exchanged. A value without state; steps are counted from 1.

    An exchange of fragment i begins after each step n with (n + offsets[i]) % every = 0, and ends `delay` steps later.
    Workers that join and leave exchange one fragment in each round, in rotation, and a round every `period` steps.
    """

    every: int
    delay: int
    offsets: tuple[int, ...]  # one per fragment, below `every`

    def after(self, step: int) -> list[Event]:
        """Return the events after inner step n, in order. Without a delay an exchange ends before the next begins."""
        begun = self._begun(step)
        if not self.delay:
            return [Event(begins, i) for i in begun for begins in (True, False)]
        ended = self._begun(step - self.delay) if step > self.delay else []
        return [Event(False, i) for i in ended] + [Event(True, i) for i in begun]

    def _begun(self, step: int) -> list[int]:
        return [i for i, offset in enumerate(self.offsets) if (step + offset) % self.every == 0]

    def next_begin(self, step: int) -> int:
        """Return the first inner step after step n that an exchange follows."""
        return step + min(self.every - (step + offset) % self.every for offset in self.offsets)

    @property
    def period(self) -> int:
        """The inner steps from one round of elastic workers to the next, at least 1."""
        return max(1, self.every // len(self.offsets))

    def in_rotation(self, rounds: int) -> int:
        """Return the index of the fragment that elastic workers exchange after `rounds` applied rounds."""
        return rounds % len(self.offsets)


def offsets(every: int, parts: int) -> list[int]:
    """Return the offsets of `parts` sets of parameters, which are exchanged every / parts steps apart."""
    return [i * every // parts for i in range(parts)]
