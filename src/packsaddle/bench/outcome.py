"""What a race leaves behind, and the rows of its tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packsaddle.bench.contenders import ALONE, DENSE
from packsaddle.bench.timing import Timing


@dataclass(frozen=True)
class Lap:
    """Training steps of one contender, as worker 0 saw them; all figures are per step."""

    contender: str
    seconds: tuple[float, ...]  # of the slowest worker; one for each block of consecutive steps
    sent: float  # bytes on the wire by packsaddle's ledger, or for a peer by the arithmetic of its collective
    received: float
    interface_sent: float | None  # bytes that the network interface counted, headers included
    interface_received: float | None


@dataclass(frozen=True)
class Finish:
    """Training of one contender until its loss reached the target, or the time was up."""

    contender: str
    reached: bool
    seconds: float  # of training, evaluation excluded
    steps: int
    loss: float | None  # the smoothed loss at the end; None: it diverged


@dataclass(frozen=True)
class Outcome:
    """Of one race."""

    laps: tuple[Lap, ...] = ()
    finishes: tuple[Finish, ...] = ()
    notes: tuple[str, ...] = ()


def step_rows(laps: Sequence[Lap], rate: float | None) -> list[dict[str, Any]]:
    """Rows of step times: beside dense DDP and, if the link's rate in bytes a second is known, beside the floor.

    "kB" are the ledger's 1,000 bytes, in the fuller direction; the floor is the time to compute a step alone plus these
    bytes at that rate; "allowed" is dense DDP's floor over the contender's; "counted" is what the interface sent.
    """
    times = {lap.contender: Timing.of(list(lap.seconds)) for lap in laps}
    compute = times[ALONE].median
    floors = {lap.contender: compute + max(lap.sent, lap.received) / rate for lap in laps} if rate else {}
    rows = []
    for lap in laps:
        t = times[lap.contender]
        row: dict[str, Any] = {
            "contender": lap.contender,
            "ms": 1000 * t.median,
            "low": 1000 * t.low,
            "high": 1000 * t.high,
        }
        if rate:
            row["floor ms"] = 1000 * floors[lap.contender]
            row["/ floor"] = t.median / floors[lap.contender]
        row["dense / it"] = times[DENSE].median / t.median
        if rate:
            row["allowed"] = floors[DENSE] / floors[lap.contender]
        row["kB"] = max(lap.sent, lap.received) / 1000
        if rate:
            row["counted kB"] = None if lap.interface_sent is None else lap.interface_sent / 1000
        rows.append(row)
    return rows


def finish_rows(finishes: Sequence[Finish]) -> list[dict[str, Any]]:
    """Rows of the times to a target; who did not reach it has no time there."""
    return [
        {
            "contender": f.contender,
            "s to target": f.seconds if f.reached else None,
            "s trained": f.seconds,
            "steps": f.steps,
            "loss at the end": f.loss,
        }
        for f in finishes
    ]
