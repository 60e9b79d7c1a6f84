"""A race of contenders in the same worker processes, which alternate in blocks of steps.

A lap is the measured time and bytes of a contender. `Outcome` is the result of a race.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.race.contenders import ALONE, DENSE, Contender, parse_all
from lab.race.peers import CannotRunError, Racer, enter, probe
from lab.race.recipe import CONSTANT, Recipe
from lab.race.workload import Batch, TrainingWorkload
from packsaddle.comm import Group, process_group, resolve
from packsaddle.plan import Timing


@dataclass(frozen=True)
class Lap:
    """Training steps of one contender, measured by worker 0; all figures are per step."""

    contender: str
    seconds: tuple[float, ...]  # times of the slowest worker, one per block of consecutive steps
    sent: float  # bytes that packsaddle's ledger counted, or that a peer's collective must send
    received: float
    interface_sent: float | None  # bytes that the network interface counted, headers included
    interface_received: float | None


@dataclass(frozen=True)
class Outcome:
    """The laps of one race, one per contender, and notes on contenders that could not run."""

    laps: tuple[Lap, ...] = ()
    notes: tuple[str, ...] = ()


def step_rows(laps: Sequence[Lap], up: float | None, down: float | None = None) -> list[dict[str, Any]]:
    """Return rows of step times relative to dense DDP's and, if the link's rates are given, relative to the floor.

    `up` and `down` (None: `up`) are bytes per second. "kB" is in units of 1,000 bytes, and counts the ledger's bytes
    sent or received, whichever are more. The floor is the time to compute a step without exchange, plus the time of the
    step's bytes in the slower direction. "allowed" is dense DDP's floor over the contender's. "counted kB" is counted
    by the network interface, for sent bytes.
    """
    times = {lap.contender: Timing.of(list(lap.seconds)) for lap in laps}
    compute = times[ALONE].median
    floors = {lap.contender: compute + max(lap.sent / up, lap.received / (down or up)) for lap in laps} if up else {}
    rows = []
    for lap in laps:
        t = times[lap.contender]
        row: dict[str, Any] = {
            "contender": lap.contender,
            "ms": 1000 * t.median,
            "low": 1000 * t.low,
            "high": 1000 * t.high,
        }
        if up:
            row["floor ms"] = 1000 * floors[lap.contender]
            row["/ floor"] = t.median / floors[lap.contender]
        row["dense / it"] = times[DENSE].median / t.median
        if up:
            row["allowed"] = floors[DENSE] / floors[lap.contender]
        row["kB"] = max(lap.sent, lap.received) / 1000
        if up:
            row["counted kB"] = None if lap.interface_sent is None else lap.interface_sent / 1000
        rows.append(row)
    return rows


# Number of untimed first steps. DDP rebuilds its buckets after step 1, and torch's PowerSGD begins at step 3.
_WARM_UP = 3


@dataclass(frozen=True)
class Race:
    """The settings of a race that are sent to the workers, as JSON."""

    workload: TrainingWorkload
    contenders: tuple[str, ...]
    lr: float = 0.1
    rounds: int = 5
    block: int = 4  # minimum number of consecutive steps per contender and round
    recipe: Recipe = CONSTANT
    interface: str | None = None  # network interface whose counted bytes are read

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in ("rounds", "block"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        self.field()  # called for its errors: ValueError for an invalid contender

    def field(self) -> list[Contender]:
        """Return all contenders: the requested ones, training without exchange (ALONE) and dense DDP (DENSE)."""
        return parse_all((ALONE, DENSE, *self.contenders), self.lr)


def in_process_group(race: Race) -> Outcome:
    """Join the process group of the launcher (torchrun), run the race, and leave the group."""
    with process_group() as group:
        settle(group)
        return run(race)


def settle(group: Group) -> None:
    """Limit this worker to one thread, and pin it to its own core if there are enough cores."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # only on Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[group.rank % len(cores)]})


def run(race: Race) -> Outcome:
    """Run a race and return its outcome; collective."""
    torch.set_num_threads(1)
    group, contenders = resolve(None), race.field()
    batches = race.workload.batches(race.workload.examples(), group.rank, group.size)
    racers: dict[str, Racer] = {}
    notes = []
    for contender in contenders:
        try:
            racers[contender.text] = _ready(contender, race, batches)
        except CannotRunError as error:
            notes.append(f"{contender.text} cannot run here: {error}")

    # Each contender takes a turn in each round.
    taken: dict[str, list[Lap]] = {text: [] for text in racers}
    for _ in range(race.rounds):
        for contender in contenders:
            if contender.text in racers:
                lap = _block(racers[contender.text], contender, race, batches, group)
                taken[contender.text].append(lap)
    for racer in racers.values():
        racer.end()
    return Outcome(laps=tuple(_merged(laps) for laps in taken.values()), notes=tuple(notes))


def _ready(contender: Contender, race: Race, batches: Callable[[int], Batch]) -> Racer:
    """Set up a contender, and warm it up until the end of a period, when no exchange runs. Raises CannotRunError."""
    racer = enter(contender, race.workload.task(), race.recipe)
    probe(racer, contender, batches(0))
    while racer.steps < _WARM_UP or racer.steps % contender.period:
        racer.step(batches(racer.steps))
    racer.wait()
    return racer


def _block(racer: Racer, contender: Contender, race: Race, batches: Callable[[int], Batch], group: Group) -> Lap:
    """Time a block of consecutive steps, consisting of whole periods. All workers begin it together.

    Batches are read before the block. Between blocks no exchange runs. If exchanges overlap with later steps, the last
    exchange of the block ends after it; in return an untimed period precedes the block, whose last exchange ends within
    the block.
    """
    steps = -(-race.block // contender.period) * contender.period
    before = contender.period if contender.delay else 0
    read = [batches(racer.steps + i) for i in range(before + steps)]
    _meet(group)
    moved, counted = racer.moved(racer.steps), _interface(race.interface)
    for batch in read[:before]:
        racer.step(batch)
    begin = time.perf_counter()
    for batch in read[before:]:
        racer.step(batch)
    seconds = time.perf_counter() - begin
    slowest = max(float(s) for s in group.all_gather(torch.tensor([seconds], dtype=torch.float64)))
    # Read the byte counts only now, after a collective of all workers: an exchange returns as soon as its own result
    # has arrived, while bytes for other workers may still be unsent.
    now, counted_now = racer.moved(racer.steps), _interface(race.interface)
    nothing: list[float | None] = [None, None]
    over = [(b - a) / len(read) for a, b in zip(counted, counted_now, strict=True)] or nothing
    sent, received = (now.sent - moved.sent) / len(read), (now.received - moved.received) / len(read)
    return Lap(contender.text, (slowest / steps,), sent, received, *over)


def _merged(laps: list[Lap]) -> Lap:
    """Merge the laps of a contender's blocks into one lap, which has all times and the mean numbers of bytes."""

    def mean(values: list[float | None]) -> float | None:
        known = [v for v in values if v is not None]
        return sum(known) / len(known) if known else None

    return Lap(
        laps[0].contender,
        tuple(s for lap in laps for s in lap.seconds),
        sum(lap.sent for lap in laps) / len(laps),
        sum(lap.received for lap in laps) / len(laps),
        mean([lap.interface_sent for lap in laps]),
        mean([lap.interface_received for lap in laps]),
    )


def _meet(group: Group) -> None:
    group.all_reduce(torch.zeros(1))


def _interface(name: str | None) -> list[int]:
    """Return the numbers of bytes that a network interface has sent and received so far; [] if `name` is None."""
    if name is None:
        return []
    folder = Path("/sys/class/net") / name / "statistics"
    return [int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx")]
