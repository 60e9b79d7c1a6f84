"""A race of contenders in the same worker processes: alternating blocks of steps, or sequential runs to a target.

`Outcome` is the result of a race: laps, finishes, and the rows of its tables.
"""

import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab.race.contenders import ALONE, DENSE, Contender, parse_all
from lab.race.peers import CannotRunError, Racer, enter, probe
from lab.race.recipe import CONSTANT, Recipe
from lab.race.workload import Batch, TrainingWorkload, evenly_spaced
from lab.runs.tasks import Dataset, Task
from packsaddle.comm import Group, process_group, resolve
from packsaddle.plan import Timing


@dataclass(frozen=True)
class Lap:
    """Training steps of one contender, measured by worker 0; all figures are per step."""

    contender: str
    seconds: tuple[float, ...]  # of the slowest worker; one per block of consecutive steps
    sent: float  # bytes by packsaddle's ledger, or for a peer computed from its collective
    received: float
    interface_sent: float | None  # bytes that the network interface counted, headers included
    interface_received: float | None


@dataclass(frozen=True)
class Finish:
    """Training of one contender until its loss reached the target, or the time limit."""

    contender: str
    reached: bool
    seconds: float  # of training, without evaluation
    steps: int
    loss: float | None  # the smoothed loss at the end; None: it diverged


@dataclass(frozen=True)
class Outcome:
    """Laps, finishes and notes of one race."""

    laps: tuple[Lap, ...] = ()
    finishes: tuple[Finish, ...] = ()
    notes: tuple[str, ...] = ()


def step_rows(laps: Sequence[Lap], up: float | None, down: float | None = None) -> list[dict[str, Any]]:
    """Return rows of step times relative to dense DDP's and, if the link's rates are given, relative to the floor.

    `up` and `down` (None: `up`) are bytes per second. "kB" are the ledger's 1,000 bytes, in the direction with more of
    them; the floor is the time to compute a step without exchange plus that of its bytes in the slower direction;
    "allowed" is dense DDP's floor over the contender's; "counted" are the bytes that the interface sent.
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


def finish_rows(finishes: Sequence[Finish]) -> list[dict[str, Any]]:
    """Return rows of the times to a target; None for a contender that did not reach it."""
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


_WARM_UP = 3  # steps: DDP rebuilds its buckets after the first, torch's PowerSGD begins at the third
_EVALUATED = 512  # training images that evaluate the loss of a race to a target
_EVERY = 25  # steps between evaluations
_SMOOTHED = 3  # number of evaluations that are averaged


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
    target_loss: float | None = None  # loss of a race to a target; None: a race by step time
    max_seconds: float = 300.0  # of training, for each contender

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        for name in ("rounds", "block", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name.replace('_', '-')} must be positive, got {getattr(self, name)}")
        if self.target_loss is not None and not self.workload.is_real:
            raise ValueError("target-loss needs data-dir: synthetic images say nothing about a time to a loss")
        if not self.field():
            raise ValueError("contenders must be at least one")

    def field(self) -> list[Contender]:
        """Return the contenders; races by step time always include ALONE and DENSE."""
        baselines = (ALONE, DENSE) if self.target_loss is None else ()
        return parse_all((*baselines, *self.contenders), self.lr)


def in_process_group(race: Race) -> Outcome:
    """Join the launcher's world, run the race, and leave the world."""
    with process_group() as group:
        settle(group)
        return run(race)


def run(race: Race) -> Outcome:
    """Run a race; collective."""
    torch.set_num_threads(1)
    group = resolve(None)
    examples = race.workload.examples()
    batches = race.workload.batches(examples, group.rank, group.size)
    contenders = race.field()
    if race.target_loss is None:
        return _step_times(race, contenders, batches, group)
    return _times_to_target(race, contenders, batches, examples, group)


def settle(group: Group) -> None:
    """Set this worker to one thread, on its own core if there are enough cores."""
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):  # Linux
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[group.rank % len(cores)]})


def _step_times(race: Race, contenders: list[Contender], batches: Callable[[int], Batch], group: Group) -> Outcome:
    racers: dict[str, Racer] = {}
    notes = []
    for contender in contenders:
        try:
            racers[contender.text] = _ready(contender, race, batches)
        except CannotRunError as error:
            notes.append(f"{contender.text} cannot run here: {error}")
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
    """Set up a racer and warm it up, to the end of a period and of its exchanges. Raises CannotRunError."""
    racer = enter(contender, race.workload.task(), race.recipe)
    probe(racer, contender, batches(0))
    while racer.steps < _WARM_UP or racer.steps % contender.period:
        racer.step(batches(racer.steps))
    racer.wait()
    return racer


def _block(racer: Racer, contender: Contender, race: Race, batches: Callable[[int], Batch], group: Group) -> Lap:
    """Time a block of consecutive steps, in whole periods, that all workers begin together; batches are read before.

    Between blocks no exchange runs. So if exchanges overlap with later steps, an untimed period precedes the block: its
    last exchange ends within the block, as the block's last one ends after it.
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
    # Only now are all of this host's bytes sent: a collective returns when its own result has arrived.
    now, counted_now = racer.moved(racer.steps), _interface(race.interface)
    nothing: list[float | None] = [None, None]
    over = [(b - a) / len(read) for a, b in zip(counted, counted_now, strict=True)] or nothing
    sent, received = (now.sent - moved.sent) / len(read), (now.received - moved.received) / len(read)
    return Lap(contender.text, (slowest / steps,), sent, received, *over)


def _merged(laps: list[Lap]) -> Lap:
    """Return one lap of several blocks: all their times, and the mean of their bytes."""

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


def _times_to_target(
    race: Race, contenders: list[Contender], batches: Callable[[int], Batch], examples: Dataset, group: Group
) -> Outcome:
    fixed = examples.batch(evenly_spaced(len(examples), _EVALUATED), torch.device("cpu"))
    finishes, notes = [], []
    for contender in contenders:
        try:
            racer = enter(contender, race.workload.task(), race.recipe)
            probe(racer, contender, batches(0))
            racer.end()
            racer = enter(contender, race.workload.task(), race.recipe)
        except CannotRunError as error:
            notes.append(f"{contender.text} cannot run here: {error}")
            continue
        finishes.append(_train(racer, contender, race, batches, fixed, group))
        racer.end()
    return Outcome(finishes=tuple(finishes), notes=tuple(notes))


def _train(
    racer: Racer, contender: Contender, race: Race, batches: Callable[[int], Batch], fixed: Batch, group: Group
) -> Finish:
    """Train until the smoothed loss reaches the target, or the time limit. Workers decide identically, by worker 0's
    clock and the mean of their losses."""
    assert race.target_loss is not None
    recent: deque[float] = deque(maxlen=_SMOOTHED)
    seconds = 0.0
    while True:
        read = [batches(racer.steps + i) for i in range(_EVERY)]
        begin = time.perf_counter()
        for batch in read:
            racer.step(batch)
        racer.wait()  # an exchange must not run during the evaluation, whose time is not counted
        seconds += time.perf_counter() - begin
        seen = group.all_gather(torch.tensor([_evaluate(racer.task, fixed), seconds], dtype=torch.float64))
        recent.append(sum(float(s[0]) for s in seen) / len(seen))
        loss, clock = sum(recent) / len(recent), float(seen[0][1])
        reached = len(recent) == _SMOOTHED and loss <= race.target_loss
        if reached or clock >= race.max_seconds or not math.isfinite(loss):
            return Finish(contender.text, reached, clock, racer.steps, loss if math.isfinite(loss) else None)


@torch.no_grad()
def _evaluate(task: Task, batch: Batch) -> float:
    task.eval()
    loss = float(task(*batch))
    task.train()
    return loss


def _meet(group: Group) -> None:
    group.all_reduce(torch.zeros(1))


def _interface(name: str | None) -> list[int]:
    """Return the bytes that a network interface has sent and received; [] without a name."""
    if name is None:
        return []
    folder = Path("/sys/class/net") / name / "statistics"
    return [int((folder / f"{way}_bytes").read_text()) for way in ("tx", "rx")]
