"""The time to train to a loss on a link: the number of steps to the loss, from curves, times the seconds of a step.

The target is the loss of dense training after nine tenths of its tokens, separately for each seed. A seed determines
the initial network and the batches, which are the same for all contenders. The number of steps and the time of a step
are measured separately (see `curves` and `race`) and multiplied here, so one curve is valid for all links.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.origin import UNKNOWN, Origin
from lab.race.contenders import ALONE, DENSE, parse
from lab.race.curves import Curve
from lab.race.race import Lap
from lab.rows import add_rows, read_rows
from packsaddle.plan import Timing

_TARGET = 0.9  # fraction of dense training's tokens after which its loss is the target


@dataclass(frozen=True)
class Rates:
    """The rates at which a host sends and receives, Mbit/s."""

    up: float
    down: float

    @classmethod
    def parse(cls, text: str) -> "Rates":
        """Read rates in Mbit/s: "50" for both directions, or "10/100" to send at 10 and receive at 100.

        Raises ValueError for an invalid text.
        """
        words = text.split("/")
        try:
            rates = [float(word) for word in words]
        except ValueError:
            rates = []
        if len(rates) not in (1, 2) or not all(0.1 <= rate <= 100_000 for rate in rates):
            raise ValueError(f"rate must be Mbit/s of 0.1 to 100,000, as 50, or 10/100 for up and down, got {text!r}")
        return cls(rates[0], rates[-1])

    def __str__(self) -> str:
        return f"{self.up:g} Mbit/s" if self.up == self.down else f"{self.up:g} up, {self.down:g} down"


@dataclass(frozen=True)
class StepOnLink:
    """A contender's step on a link of `up` and `down` Mbit/s; times are the slowest worker's."""

    workers: int
    up: float
    down: float
    contender: str
    ms: float  # milliseconds of a step, median over turns; `low` and `high` are the range
    low: float
    high: float
    kb: float  # kB per step by the ledger, sent or received, whichever are more
    counted_kb: float  # kB per step that the network interface sent
    origin: Origin = UNKNOWN

    @classmethod
    def of(cls, workers: int, link: Rates, lap: Lap, origin: Origin) -> "StepOnLink":
        """Return the row of a step on a link, from a race's lap."""
        time = Timing.of(list(lap.seconds))
        ms, low, high = (round(1000 * seconds, 3) for seconds in (time.median, time.low, time.high))
        counted = (lap.interface_sent or 0.0) / 1000
        kb = max(lap.sent, lap.received) / 1000
        sent = round(kb, 3), round(counted, 3)
        return cls(workers, link.up, link.down, lap.contender, ms, low, high, *sent, origin)

    @property
    def link(self) -> Rates:
        """The rates of the link on which the step was timed."""
        return Rates(self.up, self.down)


def save_steps(path: Path, steps: Iterable[StepOnLink]) -> None:
    """Add rows of timed steps to a CSV file."""
    rows = map(asdict, steps)
    add_rows(path, [row | row.pop("origin") for row in rows])


def load_steps(path: Path) -> list[StepOnLink]:
    """Return the timed steps in a CSV file, [] if it does not exist. Raises ValueError for an invalid row."""
    return read_rows(path, _step, "step on a link")


def _step(row: Mapping[str, Any]) -> StepOnLink:
    numbers = {name: float(row[name]) for name in ("up", "down", "ms", "low", "high", "kb", "counted_kb")}
    return StepOnLink(int(row["workers"]), contender=row["contender"], origin=Origin.of_row(row), **numbers)


@dataclass(frozen=True)
class Entry:
    """One method with one training length: its curves at the best step size, one per seed."""

    method: str
    curves: tuple[Curve, ...]

    @property
    def is_ours(self) -> bool:
        """True if the method is packsaddle's, not a peer."""
        return is_ours(self.method)

    @property
    def losses(self) -> list[float]:
        """The final losses of the curves, one per seed."""
        return [curve.final for curve in self.curves]

    def steps_to(self, targets: Mapping[int, float]) -> list[float] | None:
        """Return the number of steps to the target for each seed. `targets` has the target losses by seed.

        Returns None if a seed does not reach its target or has no target.
        """
        found = [curve.steps_to(targets.get(curve.seed, -math.inf)) for curve in self.curves]
        return None if None in found else [steps for steps in found if steps is not None]


def is_ours(method: str) -> bool:
    """Return True if a method is packsaddle's, not a peer."""
    return not parse(method, 1.0).peer


def entries(curves: Sequence[Curve]) -> list[Entry]:
    """Return one entry for each method and each training length. All `curves` have the same number of workers."""
    groups: dict[tuple[str, int], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((parse(curve.contender, curve.lr).method, curve.steps), []).append(curve)
    return [Entry(method, tuple(_best(group))) for (method, _), group in groups.items()]


def _best(group: list[Curve]) -> list[Curve]:
    """Return the curves at the best step size, ordered by seed.

    The best step size has the lowest mean final loss, among those that were run with the most seeds.
    """
    by_rate: dict[tuple[str, float], list[Curve]] = {}
    for curve in group:
        by_rate.setdefault((curve.contender, curve.lr), []).append(curve)
    most = max(map(len, by_rate.values()))
    full = [mine for mine in by_rate.values() if len(mine) == most]
    return sorted(min(full, key=lambda mine: statistics.fmean(c.final for c in mine)), key=lambda c: c.seed)


def dense_of(found: Iterable[Entry]) -> Entry | None:
    """Return the first entry of dense training, or None if there is none."""
    return next((entry for entry in found if entry.method == DENSE), None)


def targets_of(dense: Entry) -> dict[int, float]:
    """Return the target losses by seed: the loss of dense training after nine tenths of its tokens."""
    return {curve.seed: curve.loss_at(_TARGET * curve.steps) for curve in dense.curves}


def rows(curves: Sequence[Curve], steps: Sequence[StepOnLink]) -> list[dict[str, Any]]:
    """Return one row for each method and training length of one number of workers: losses, kB, times to the target.

    The time on a link is empty if the step was not timed there, and infinite if the loss was not reached. Raises
    ValueError without dense training.
    """
    found = entries(curves)
    dense = dense_of(found)
    if dense is None:
        raise ValueError(f"curves must include {DENSE}, by which the target is set")
    targets, links = targets_of(dense), list(dict.fromkeys(step.link for step in steps))
    timed = {(parse(s.contender, 1.0).method, s.link): s for s in steps}
    table = []
    for entry in found:
        reached = entry.steps_to(targets)
        row: dict[str, Any] = {
            "method": entry.method,
            "lr": entry.curves[0].lr,
            "tokens": entry.curves[0].steps / dense.curves[0].steps,
            "seeds": len(entry.curves),
            "loss": statistics.fmean(entry.losses),
            "low": min(entry.losses),
            "high": max(entry.losses),
            "kB": entry.curves[0].sent / 1000,
            "MB memory": min(curve.peak_mb for curve in entry.curves),
            "steps": None if reached is None else statistics.fmean(reached),
        }
        for link in links:
            step = timed.get((entry.method, link))
            seconds = None if step is None else math.inf
            if step is not None and reached is not None:
                seconds = statistics.fmean(reached) * step.ms / 1000
            row[str(link)] = seconds
        table.append(row)
    return table


def verdicts(table: Sequence[Mapping[str, Any]], steps: Sequence[StepOnLink]) -> list[dict[str, Any]]:
    """Return one row per link: packsaddle's fastest method, the fastest of torch's own methods, and their times' ratio.

    `table` is the result of `rows`.
    """
    found = []
    for link in dict.fromkeys(step.link for step in steps):
        name = str(link)
        timed = [row for row in table if row[name] is not None and row[name] < math.inf]
        ours = min((r for r in timed if is_ours(r["method"])), key=lambda r: r[name], default=None)
        peer = min((r for r in timed if not is_ours(r["method"])), key=lambda r: r[name], default=None)
        found.append(
            {
                "link": name,
                "packsaddle": "none" if ours is None else ours["method"],
                "s": None if ours is None else ours[name],
                "best peer": "none" if peer is None else peer["method"],
                "peer s": None if peer is None else peer[name],
                "ratio": None if ours is None or peer is None else ours[name] / peer[name],
            }
        )
    return found


def computing(steps: Sequence[StepOnLink]) -> list[dict[str, Any]]:
    """Return one row per contender: the fraction of a step's time that is computing, for each link."""
    alone = {step.link: step.ms for step in steps if step.contender == ALONE}
    table: dict[str, dict[str, Any]] = {}
    for step in steps:
        if step.contender != ALONE and step.link in alone:
            row = table.setdefault(step.contender, {"contender": step.contender})
            row[str(step.link)] = min(1.0, alone[step.link] / step.ms)
    names = [str(link) for link in alone]
    return [{"contender": name} | {link: row.get(link) for link in names} for name, row in table.items()]
