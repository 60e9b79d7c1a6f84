"""The ledger: how many bytes this worker put on the wire and took from it, by step and by purpose."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bytes:
    """Bytes of one worker. `payload`: its own messages. `sent`, `received`: on the wire, forwarding included."""

    payload: int = 0
    sent: int = 0
    received: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.payload + other.payload, self.sent + other.sent, self.received + other.received)


@dataclass(frozen=True)
class Span:
    """Consecutive steps, first..last, that moved the same bytes for the same purposes."""

    first: int
    last: int
    by_purpose: Mapping[str, Bytes]


class Ledger:
    """Counts every collective. Steps that move equal bytes are kept as one `Span`, so memory stays small."""

    def __init__(self) -> None:
        self._spans: list[Span] = []
        self._totals: dict[str, Bytes] = {}

    def add(self, step: int, purpose: str, moved: Bytes) -> None:
        """Record bytes moved at a step; steps must not decrease."""
        self._totals[purpose] = self._totals.get(purpose, Bytes()) + moved
        current = dict(self.at(step))
        current[purpose] = current.get(purpose, Bytes()) + moved
        self._put(step, current)

    def _put(self, step: int, current: Mapping[str, Bytes]) -> None:
        if self._spans and self._spans[-1].last == step:
            last = self._spans.pop()
            if last.first < step:
                self._spans.append(Span(last.first, step - 1, last.by_purpose))
        if self._spans and self._spans[-1].last == step - 1 and self._spans[-1].by_purpose == current:
            self._spans[-1] = Span(self._spans[-1].first, step, current)
        else:
            self._spans.append(Span(step, step, current))

    def at(self, step: int) -> Mapping[str, Bytes]:
        """Return the bytes of one step by purpose (empty if nothing moved)."""
        for span in reversed(self._spans):
            if span.first <= step <= span.last:
                return span.by_purpose
            if span.last < step:
                break
        return {}

    @property
    def spans(self) -> tuple[Span, ...]:
        """The history, run-length coded, in order of steps."""
        return tuple(self._spans)

    @property
    def by_purpose(self) -> Mapping[str, Bytes]:
        """Totals by purpose."""
        return dict(self._totals)

    @property
    def total(self) -> Bytes:
        """The total over all steps and purposes."""
        return sum(self._totals.values(), Bytes())

    def state_dict(self) -> dict[str, Any]:
        """Return the totals as plain types; the per-step history is not kept across checkpoints."""
        return {name: [b.payload, b.sent, b.received] for name, b in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore totals saved by `state_dict`."""
        self._totals = {name: Bytes(*counts) for name, counts in state.items()}
        self._spans = []
