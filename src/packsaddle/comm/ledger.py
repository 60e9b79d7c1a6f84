"""The ledger, a record of the bytes that this worker sent and received, by step and by purpose."""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_KEPT = 1000  # maximum number of spans that a ledger keeps
Totals = list[tuple[str, str, int, int, int]]  # (purpose, collective, bytes of payload, bytes sent, bytes received)


@dataclass(frozen=True)
class Bytes:
    """Byte counts of one worker: `payload`, the bytes of its own messages, and bytes `sent` and `received`.

    `sent` and `received` include messages of other workers that this one forwards in a ring.

    >>> from packsaddle import Bytes
    >>> Bytes(payload=4, sent=8, received=8) + Bytes(sent=1)
    Bytes(payload=4, sent=9, received=8)
    """

    payload: int = 0
    sent: int = 0
    received: int = 0

    def __add__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.payload + other.payload, self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: "Bytes") -> "Bytes":
        return Bytes(self.payload - other.payload, self.sent - other.sent, self.received - other.received)

    def part_of(self, processes: int) -> "Bytes":
        """Return the `Bytes` of one process if the bytes of this object are divided equally among `processes`
        processes. Each of the three numbers is rounded up."""
        return Bytes(*(-(-n // processes) for n in (self.payload, self.sent, self.received)))

    def __str__(self) -> str:
        return f"{self.sent:,} bytes sent, {self.received:,} received, payload {self.payload:,}"


@dataclass(frozen=True)
class Span:
    """Consecutive steps, first..last, with equal bytes for each purpose."""

    first: int
    last: int
    by_purpose: Mapping[str, Bytes]  # bytes of one of these steps, by purpose


class Ledger:
    """Record of one worker's bytes in every collective, by step and purpose.

    Consecutive steps with equal bytes are one `Span`, and only the newest 1,000 spans are kept. Totals cover all steps.

    >>> import torch
    >>> from packsaddle import CompressedSGD, TopK, simulate
    >>> def work(rank):
    ...     weight = torch.nn.Parameter(torch.ones(64, 64))
    ...     opt = CompressedSGD([weight], 0.1, TopK(0.01))
    ...     weight.grad = torch.full_like(weight, rank + 1.0)
    ...     opt.step()
    ...     return opt.ledger
    >>> print(simulate(work, 2)[0])
    bytes    payload    sent  received
    start     16,392  16,392         8
    indices       44      44        44
    values       164     164       164
    dense          4       4         4
    total     16,604  16,604       220
    """

    def __init__(self) -> None:
        self._spans: deque[Span] = deque(maxlen=_KEPT)
        self._totals: dict[tuple[str, str], Bytes] = {}  # total bytes by purpose and collective

    def __str__(self) -> str:
        rows = [("bytes", "payload", "sent", "received")]
        for purpose, moved in [*self.by_purpose.items(), ("total", self.total)]:
            rows.append((purpose, f"{moved.payload:,}", f"{moved.sent:,}", f"{moved.received:,}"))
        first, *others = (max(map(len, column)) for column in zip(*rows, strict=True))
        return "\n".join(
            "  ".join([name.ljust(first), *(cell.rjust(width) for cell, width in zip(cells, others, strict=True))])
            for name, *cells in rows
        )

    def add(self, step: int, purpose: str, collective: str, moved: Bytes) -> None:
        """Record `moved`, the bytes of one call of `collective` at `step`, under the name `purpose`. `step` must not be
        smaller than in the previous call."""
        self._totals[purpose, collective] = self._totals.get((purpose, collective), Bytes()) + moved
        # Remove this step from the newest span. Then extend the span that ends at the previous step, if both steps have
        # equal bytes, or start a new span.
        current: dict[str, Bytes] = {}
        if self._spans and self._spans[-1].last == step:
            last = self._spans.pop()
            current = dict(last.by_purpose)
            if last.first < step:
                self._spans.append(Span(last.first, step - 1, last.by_purpose))
        current[purpose] = current.get(purpose, Bytes()) + moved
        if self._spans and self._spans[-1].last == step - 1 and self._spans[-1].by_purpose == current:
            self._spans[-1] = Span(self._spans[-1].first, step, current)
        else:
            self._spans.append(Span(step, step, current))

    def at(self, step: int) -> Mapping[str, Bytes]:
        """Return the bytes of one step by purpose. Returns {} if nothing was sent at that step, or if the step is so
        old that its bytes are no longer kept."""
        for span in reversed(self.spans):
            if span.first <= step <= span.last:
                return span.by_purpose
            if span.last < step:
                break
        return {}

    @property
    def spans(self) -> tuple[Span, ...]:
        """The newest spans (consecutive steps with equal bytes), in ascending order of steps."""
        return tuple(self._spans)

    @property
    def by_purpose(self) -> Mapping[str, Bytes]:
        """Total bytes over all steps, as a dict by purpose. A purpose is a name such as "values", "indices", "padding"
        or "dense"."""
        return self._sum(0)

    def _sum(self, position: int) -> Mapping[str, Bytes]:
        sums: dict[str, Bytes] = {}
        # Copy the totals, since a background exchange may change them meanwhile.
        for key, moved in self._totals.copy().items():
            sums[key[position]] = sums.get(key[position], Bytes()) + moved
        return sums

    @property
    def total(self) -> Bytes:
        """The payload, and the bytes sent and received, over all steps and purposes."""
        return sum(self._totals.copy().values(), Bytes())

    @property
    def sent(self) -> int:
        """The number of bytes that this worker sent in all steps, equal to `total.sent`."""
        return self.total.sent

    @property
    def received(self) -> int:
        """The number of bytes that this worker received in all steps, equal to `total.received`."""
        return self.total.received

    def state_dict(self) -> list[list[Any]]:
        """Return the total bytes as plain types; the per-step history is not checkpointed."""
        return [[*key, b.payload, b.sent, b.received] for key, b in self._totals.copy().items()]

    def load_state_dict(self, state: Totals) -> None:
        """Restore the total bytes from `state`, a result of `state_dict`, and clear the per-step history."""
        self._totals = {(purpose, collective): Bytes(*counts) for purpose, collective, *counts in state}
        self._spans.clear()
