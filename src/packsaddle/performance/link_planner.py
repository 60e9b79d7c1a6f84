"""Which compressor makes the shortest step on a link, and whether any beats sending everything."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from packsaddle.comm.select_aggregator import Choice, choose
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import describe
from packsaddle.performance.coding_speed import Pace
from packsaddle.performance.step_time import Dense, Fleet, Link, Step, StepTime, break_even, compressed
from packsaddle.performance.steps_needed import Optimizer, StepsNeeded, steps_needed
from packsaddle.performance.workload import Workload

DENSE = "none"


@dataclass(frozen=True)
class Forecast:
    """One contender. `sent` is bytes of the busiest worker a step; `break_even` a payload rate, bytes a second."""

    compressor: str  # "none" for DistributedDataParallel
    exchange: str
    sent: int
    time: StepTime
    break_even: float | None  # below it this is quicker than dense training; None: on every link, or on none
    steps: StepsNeeded | None  # for the progress of one dense step; None: not measured

    @property
    def is_dense(self) -> bool:
        return self.compressor == DENSE

    @property
    def is_known(self) -> bool:
        """Whether the steps it needs have been measured to their end."""
        return self.steps is not None and not self.steps.at_least

    @property
    def seconds(self) -> float:
        """The time for the progress of one dense step; where steps are not known, of one of its own."""
        return self.time.total * (self.steps.factor if self.steps else 1.0)


@dataclass(frozen=True)
class Verdict:
    """Every contender, the quickest first, those whose steps are not known last."""

    forecasts: tuple[Forecast, ...]

    @property
    def best(self) -> Forecast:
        return self.forecasts[0]

    @property
    def dense(self) -> Forecast:
        return next(f for f in self.forecasts if f.is_dense)

    @property
    def compress(self) -> bool:
        """Whether a compressor beats dense."""
        return not self.best.is_dense

    @property
    def break_even(self) -> float | None:
        """The payload rate below which some compressor beats dense; None if it cannot be, or is on every link."""
        return max((f.break_even for f in self.forecasts if f.is_known and f.break_even is not None), default=None)

    def plain(self) -> list[dict[str, Any]]:
        """Return the forecasts as plain types, seconds with their total."""
        return [{**asdict(f), "seconds": f.time.total, "seconds_for_a_dense_step": f.seconds} for f in self.forecasts]


def forecast(
    workload: Workload,
    link: Link,
    fleet: Fleet,
    compressors: Sequence[Compressor],
    pace: Callable[[Compressor, int], Pace],
    *,
    update: float = 0.0,
    overlap: bool = True,
    optimizer: Optimizer | None = None,
) -> Verdict:
    """Predict every compressor's step in single precision, each by its fastest exchange, and DDP's.

    `pace(compressor, d)` says how fast one codes, `update` what CompressedSGD takes besides, in seconds (see
    `performance.workload.update_seconds`); both are counted as compression. With an optimizer, times are multiplied by
    the steps that compressors were measured to need behind it. Raises ValueError for fewer than two workers or an
    impossible compressor.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")
    nbytes = 4 * (workload.d + workload.dense)
    dense = Dense(nbytes, overlap)
    sent = round(2 * (fleet.workers - 1) / fleet.workers * nbytes)
    found = [Forecast(DENSE, "all-reduce", sent, dense.time(link, fleet), None, StepsNeeded(1.0))]
    for compressor in compressors:
        bound = workload.bind(compressor)
        seconds = pace(bound, workload.d).seconds
        steps: list[tuple[Choice, Step]] = []
        for choice in _choices(bound, workload, fleet.workers):
            coded = compressed(choice.protocol, workload.d, workload.dense, fleet.workers, seconds)
            steps.append((choice, replace(coded, compression=coded.compression + update)))
        choice, step = min(steps, key=lambda s: s[1].time(link, fleet).total)
        ranks = {0, fleet.workers - 1}  # chunks, and so bytes, differ by a coordinate at most
        wires = [choice.protocol.wire(workload.d, workload.dense, rank, fleet.workers, 4).sent for rank in ranks]
        needed = steps_needed(compressor, optimizer)
        equal = break_even(step, dense, link, fleet, needed.factor if needed else 1.0)
        found.append(Forecast(describe(compressor), choice.name, max(wires), step.time(link, fleet), equal, needed))
    return Verdict(tuple(sorted(found, key=lambda f: (not f.is_known, f.seconds))))


def _choices(compressor: Compressor, workload: Workload, workers: int) -> list[Choice]:
    """The direct exchange and, where that is an all-gather, the owners'."""
    d, dense = workload.d, workload.dense
    direct = choose(compressor, "direct", d=d, dense=dense, workers=workers)
    if direct.name != "all-gather" or d < workers:
        return [direct]
    return [direct, choose(compressor, "two-way", d=d, dense=dense, workers=workers)]
