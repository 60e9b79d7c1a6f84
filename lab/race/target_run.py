"""Trainings until a target loss, by the clock, and timed blocks of steps. All workers of a link run this module.

A training's time has three parts: the start (packsaddle's and DDP's first exchange), the steps until the loss reaches
the target, interpolated between two evaluations, and the flush, which gives all workers one model. The clock is stopped
during evaluations. They are made where no exchange overlaps with steps, so that no exchange proceeds untimed.

    python -m lab.race.target_run JOBS.json     # on a host, by torchrun
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from lab.origin import UNKNOWN, Origin
from lab.race.entrant import Entrant, enter
from lab.race.inner import held_out_loss
from lab.race.race import settle
from lab.race.target_settings import Method, TargetSettings, alone, rate_of
from lab.race.workload import Batch, TrainingWorkload, evenly_spaced
from lab.rows import add_rows, read_rows
from lab.tasks import Batches, Dataset, make_task, shard
from packsaddle.comm import Group, process_group
from packsaddle.options import build
from packsaddle.plan import Timing

_ALONE = 25  # number of steps of a timed block without exchanges


@dataclass(frozen=True)
class TargetRun:
    """The row of one training until the target. Times are seconds by worker 0's clock; bytes are those of worker 0."""

    workers: int
    rate: str
    method: str
    seed: int
    lr: float
    target: float
    reached: bool  # False: the target was not reached, and all numbers are those at the end of the training
    steps: float  # number of steps to the target, interpolated
    start_s: float
    train_s: float  # duration of the steps to the target, interpolated, without evaluations
    flush_s: float
    block_ms: float  # milliseconds per step: the median over the blocks between evaluations
    rounds_mb: float  # megabytes that all steps sent, counted by the ledger (for peers: computed)
    with_ends_mb: float  # megabytes that start, steps and flush sent, counted in the same way
    counted_mb: float | None  # megabytes that the network interface sent during start, steps and flush, with headers
    curve: str  # "step:seconds:loss" of each evaluation, separated by spaces
    # Milliseconds of a step without exchanges, by the slowest worker: mean of two blocks, before and after training.
    alone_ms: float | None = None
    origin: Origin = UNKNOWN

    @property
    def total_s(self) -> float:
        """The total seconds of start, steps and flush."""
        return self.start_s + self.train_s + self.flush_s


@dataclass(frozen=True)
class TargetStep:
    """The milliseconds of a method's step, by the slowest worker: median and range over blocks."""

    workers: int
    rate: str
    method: str
    ms: float
    low: float
    high: float
    steps: int  # number of steps of a block
    origin: Origin = UNKNOWN


@dataclass(frozen=True)
class Training:
    """A training to run: a method and a seed."""

    method: str
    seed: int


@dataclass(frozen=True)
class Jobs:
    """The work for the workers on one link: trainings, and methods whose steps are timed. Workers read it as JSON."""

    settings: TargetSettings
    out: str  # folder that contains runs.csv and steps.csv
    rate: str
    trainings: tuple[Training, ...] = ()
    timed: tuple[str, ...] = ()  # methods whose steps are timed, in alternating blocks
    interface: str = ""  # network interface whose bytes are counted; "": none


def work(jobs: Jobs) -> None:
    """Run the jobs; collective. Worker 0 adds a row after each training, and all rows of timed steps at the end."""
    with process_group() as group:
        settle(group)
        texts = _texts(jobs.settings)
        if jobs.timed:
            rows = time_steps(jobs, texts, group)
            if group.rank == 0:
                save(Path(jobs.out) / "steps.csv", rows)
        for training in jobs.trainings:
            run = train(jobs, training, texts, group)
            if group.rank == 0:
                save(Path(jobs.out) / "runs.csv", [run])
                state = "reached" if run.reached else "not reached"
                how = f"{state}, {run.total_s:.1f} s, {run.steps:.0f} steps"
                print(f"{run.rate}, {run.method}, seed {run.seed}: {how}", flush=True)


def train(jobs: Jobs, training: Training, texts: tuple[Dataset, Dataset], group: Group) -> TargetRun:
    """Train with one method and seed until the target; collective."""
    settings, seed, clock = jobs.settings, training.seed, _Clock(jobs.interface)
    method = settings.method(training.method)
    lr = rate_of(method, group.size, settings.target)
    batches = _batches(settings, texts[0], seed, group)
    _warm_up(settings, method, texts[0], batches, group)
    network, windows = _network(settings, texts[0], seed), evenly_spaced(len(texts[1]), settings.windows)

    # Time steps without exchanges before and after the training, since the machine's speed varies between trainings.
    computing = _enter_to_time(settings, alone(method.inner), texts[0])
    _block(computing, 2, batches, group)
    blocks = [_block(computing, _ALONE, batches, group)]

    # Time the start, then blocks of steps, with an untimed evaluation after each block.
    with clock.running(group):
        entrant = enter(method, network, lr, steps=settings.steps, warm_up=settings.warm_up)
    start, begun = clock.seconds, entrant.sent()
    curve: list[tuple[int, float, float]] = []
    while True:
        end = method.next_quiet(entrant.steps + settings.evaluate_every)
        with clock.running(group):
            while entrant.steps < end:
                entrant.step(batches(entrant.steps))
        with torch.no_grad(), entrant.common_model(group):
            loss = held_out_loss(network, texts[1], windows)
        elapsed = float(group.all_gather(torch.tensor([clock.seconds - start], dtype=torch.float64))[0])
        curve.append((entrant.steps, elapsed, loss))
        if not settings.target < loss < float("inf") or end >= settings.steps or elapsed > settings.max_seconds:
            break

    # Time the flush, and make the row.
    before, rounds = clock.seconds, entrant.sent() - begun
    with clock.running(group):
        entrant.flush()
    blocks.append(_block(computing, _ALONE, batches, group))
    steps, seconds = crossing(curve, settings.target)
    return TargetRun(
        group.size,
        jobs.rate,
        method.name,
        seed,
        lr,
        settings.target,
        reached=curve[-1][2] <= settings.target,
        steps=round(steps, 1),
        start_s=round(start, 3),
        train_s=round(seconds, 3),
        flush_s=round(clock.seconds - before, 3),
        block_ms=round(1000 * statistics.median(_block_seconds(curve)), 3),
        rounds_mb=round(rounds / 1e6, 4),
        with_ends_mb=round(entrant.sent() / 1e6, 4),
        counted_mb=round(clock.sent / 1e6, 4) if jobs.interface else None,
        curve=" ".join(f"{step}:{at:.2f}:{loss:.4f}" for step, at, loss in curve),
        alone_ms=round(1000 * statistics.fmean(blocks) / _ALONE, 3),
        origin=_origin(settings),
    )


def crossing(curve: Sequence[tuple[int, float, float]], target: float) -> tuple[float, float]:
    """Return the steps and seconds at which the loss falls to the target.

    `curve` has (steps, seconds, loss) of each evaluation up to the first one that reaches the target. The result is
    interpolated between the last two evaluations. If the target was not reached, or there is only one evaluation, it is
    that of the last evaluation.
    """
    step, seconds, loss = curve[-1]
    if len(curve) < 2 or not loss <= target:
        return float(step), seconds
    step_before, seconds_before, loss_before = curve[-2]
    part = (loss_before - target) / (loss_before - loss)
    return step_before + part * (step - step_before), seconds_before + part * (seconds - seconds_before)


def time_steps(jobs: Jobs, texts: tuple[Dataset, Dataset], group: Group) -> list[TargetStep]:
    """Time blocks of steps of all methods, which alternate; collective.

    A block consists of whole periods, and begins and ends at a quiet step, after which no overlapping exchange runs.
    """
    settings = jobs.settings
    batches = _batches(settings, texts[0], 0, group)
    timed = [replace(settings.method(name), start=2) for name in jobs.timed]
    methods = [*map(alone, sorted({method.inner for method in timed})), *timed]
    entrants, lengths, taken = [], list[int](), [list[float]() for _ in methods]
    for method in methods:
        entrant = _enter_to_time(settings, method, texts[0])
        entrants.append(entrant)

        # Warm up until PowerSGD compresses, then time one period to choose the length of a block.
        _block(entrant, method.next_quiet(3), batches, group)
        one = _block(entrant, method.every, batches, group)
        periods = min(settings.block, settings.block_seconds * method.every / one) / method.every
        lengths.append(max(1, round(periods)) * method.every)
    for _ in range(settings.rounds):
        for entrant, length, mine in zip(entrants, lengths, taken, strict=True):
            mine.append(_block(entrant, length, batches, group) / length)
    rows = []
    for method, length, seconds in zip(methods, lengths, taken, strict=True):
        timing = Timing.of(seconds)
        ms, low, high = (round(1000 * each, 3) for each in (timing.median, timing.low, timing.high))
        rows.append(TargetStep(group.size, jobs.rate, method.name, ms, low, high, length, _origin(settings)))
    return rows


def _enter_to_time(settings: TargetSettings, method: Method, data: Dataset) -> Entrant:
    """Set up a method with a network that is only timed, at a learning rate at which no method diverges; collective."""
    network = _network(settings, data, 0)
    return enter(method, network, 1e-4, steps=settings.steps, warm_up=settings.warm_up)


def _block(entrant: Entrant, steps: int, batches: Callable[[int], Batch], group: Group) -> float:
    """Do a block of steps, which all workers begin together, and return the seconds of the slowest worker."""
    group.all_reduce(torch.zeros(1))
    begin = time.perf_counter()
    for _ in range(steps):
        entrant.step(batches(entrant.steps))
    seconds = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
    return max(float(each) for each in group.all_gather(seconds))


class _Clock:
    """A clock that is stopped between phases; it also counts the bytes that this worker's interface sends."""

    def __init__(self, interface: str) -> None:
        self.seconds, self.sent = 0.0, 0
        self._counter = Path("/sys/class/net") / interface / "statistics" / "tx_bytes" if interface else None

    @contextmanager
    def running(self, group: Group) -> Iterator[None]:
        """Count time and bytes within this context. All workers begin it together."""
        group.all_reduce(torch.zeros(1))
        before, begin = self._bytes(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - begin
        self.sent += self._bytes() - before

    def _bytes(self) -> int:
        return int(self._counter.read_text()) if self._counter else 0


def _warm_up(
    settings: TargetSettings, method: Method, data: Dataset, batches: Callable[[int], Batch], group: Group
) -> None:
    """Do two steps with a temporary network, so that compiling loops and opening connections is not timed."""
    local = method.kind in ("local", "local-sgd")
    short = replace(method, every=2 if local else 1, overlap=min(method.overlap, 1), start=2)
    entrant = _enter_to_time(settings, short, data)
    _block(entrant, 2, batches, group)
    entrant.flush()


def _block_seconds(curve: Sequence[tuple[int, float, float]]) -> list[float]:
    """Return the seconds per step for each block of steps between two evaluations of a `curve`."""
    ends = [(0, 0.0), *((step, seconds) for step, seconds, _ in curve)]
    return [(b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(ends)]


def _texts(settings: TargetSettings) -> tuple[Dataset, Dataset]:
    workload = _workload(settings)
    return workload.examples(train=True), workload.examples(train=False)


def _workload(settings: TargetSettings) -> TrainingWorkload:
    return TrainingWorkload("gpt", settings.batch, settings.text or None)


def _network(settings: TargetSettings, data: Dataset, seed: int) -> Any:
    return make_task(settings.model, data.shape, data.classes, seed=seed)


def _batches(settings: TargetSettings, data: Dataset, seed: int, group: Group) -> Callable[[int], Batch]:
    """Return a function from a step to this worker's batch, which is the same as in lab/bench/muon.py."""
    mine = shard(data, "iid", worker=group.rank, workers=group.size, seed=seed)
    order, cpu = Batches(mine, settings.batch, worker=group.rank, seed=seed), torch.device("cpu")
    return lambda step: data.batch(order[step], cpu)


def _origin(settings: TargetSettings) -> Origin:
    return Origin.here(threads=1, text=_workload(settings).text_hash())


def save(path: Path, rows: Sequence[TargetRun | TargetStep]) -> None:
    """Add rows to a CSV file."""
    plain = [asdict(row) for row in rows]
    add_rows(path, [row | row.pop("origin") for row in plain])


def load_runs(path: Path) -> list[TargetRun]:
    """Return the trainings of a file, [] if it does not exist. Raises ValueError for an invalid row."""
    return read_rows(path, lambda row: TargetRun(**_cells(row, TargetRun)), "training to a target")


def load_steps(path: Path) -> list[TargetStep]:
    """Return the timed steps of a file, [] if it does not exist. Raises ValueError for an invalid row."""
    return read_rows(path, lambda row: TargetStep(**_cells(row, TargetStep)), "timed step")


def _cells(row: Mapping[str, str], kind: type) -> dict[str, Any]:
    """Return a CSV row's cells, converted to the types of the fields of the dataclass `kind`."""
    found: dict[str, Any] = {"origin": Origin.of_row(row)}
    for name, hint in kind.__annotations__.items():
        text = row.get(name) or ""
        if hint is bool:
            found[name] = text == "True"
        elif hint in (int, float, str):
            found[name] = hint(text)
        elif name != "origin":
            found[name] = float(text) if text else None
    return found


def main(path: str) -> None:
    """Run the jobs in a JSON file, as a worker that torchrun has started."""
    work(build(Jobs, json.loads(Path(path).read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
