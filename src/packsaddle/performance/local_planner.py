"""The plan for local updates on a link: their period, compressor and overlap.

A round comes every H inner steps, and its exchange may overlap the next `delay` of them. How many steps it takes
to the loss of dense training was measured (experiments/race); a setting that was not is not planned with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from packsaddle.comm.cost_model import RingAllGather
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Identity, Sign, TopK
from packsaddle.compressors.registry import describe
from packsaddle.optim.stages.lockstep import HEADER
from packsaddle.performance.coding_speed import Pace
from packsaddle.performance.step_time import Fleet, Link, compressed
from packsaddle.performance.workload import ModelSize


@dataclass(frozen=True)
class Setting:
    """Arguments of `LocalUpdates`."""

    every: int
    compressor: Compressor
    keep_unsent: bool = False


_SETTINGS = (
    Setting(2, Sign(per_tensor=True), keep_unsent=True),
    Setting(2, TopK(1 / 16, values="int2"), keep_unsent=True),
    Setting(8, Identity()),
    Setting(8, Sign(per_tensor=True), keep_unsent=True),
    Setting(8, TopK(1 / 16, values="int2"), keep_unsent=True),
    Setting(32, Identity()),
    Setting(32, TopK(1 / 48, values="int2"), keep_unsent=True),
)
# Multiples of dense training's steps for the same loss, AdamW, each setting at its best rate of one grid, for two and
# four workers: experiments/race, "Steps needed". Dense training gains more from a larger batch than local updates do.
_MEASURED: Mapping[int, Mapping[Setting, float]] = {
    2: dict(zip(_SETTINGS, (1.1, 1.2, 1.3, 1.3, 1.4, 1.5, 1.7), strict=True)),
    4: dict(zip(_SETTINGS, (1.4, 1.5, 1.6, 1.7, 1.9, 2.2, 2.8), strict=True)),
}


def measured_with(workers: int) -> Mapping[Setting, float]:
    """Return the multiples of dense training's steps for a number of workers; from three on those of four."""
    return _MEASURED[2 if workers <= 2 else 4]


_STALE = 4  # an exchange overlaps at most this part of H, where fragments can make it so short


@dataclass(frozen=True)
class LocalForecast:
    """The cost of a setting. Seconds are of a mean inner step; `sent` is of the busiest worker, bytes a step."""

    setting: Setting
    delay: int  # inner steps that the exchange overlaps
    fragments: int
    sent: float
    compute: float  # with waiting for the slowest worker, once a round
    waiting: float  # of that
    coding: float
    exchange: float  # that steps wait for
    steps: float  # for the progress of one dense step

    @property
    def step(self) -> float:
        """Seconds of an inner step."""
        return self.compute + self.coding + self.exchange

    @property
    def seconds(self) -> float:
        """Seconds for the progress of one dense step."""
        return self.step * self.steps

    @property
    def computing(self) -> float:
        """The share of the time that goes into forward and backward passes."""
        return (self.compute - self.waiting) / self.step

    def plain(self) -> dict[str, Any]:
        """Return it as plain types."""
        return {
            "every": self.setting.every,
            "compressor": describe(self.setting.compressor),
            "keep_unsent": self.setting.keep_unsent,
            "delay": self.delay,
            "fragments": self.fragments,
            "sent": self.sent,
            "seconds": self.step,
            "computing": self.computing,
            "steps": self.steps,
            "seconds_for_a_dense_step": self.seconds,
        }


def forecast_local(
    workload: ModelSize,
    link: Link,
    fleet: Fleet,
    pace: Callable[[Compressor, int], Pace],
    *,
    update: float = 0.0,
    most_steps: float = math.inf,
    measured: Mapping[Setting, float] | None = None,
    overlap: bool = True,
) -> tuple[LocalForecast, ...]:
    """Predict the settings that need at most `most_steps` times dense training's steps, the quickest first.

    `pace(compressor, d)` says how fast one codes, `update` the time to make v and to absorb, in seconds a
    round. There are as many fragments as bring the exchange of one below a quarter of H, if that hides all of it, else
    as many as leave the least to wait for. The delay is the least that hides the exchange of one fragment; without
    `overlap` steps wait for all of it. Raises ValueError for fewer than two workers, and if no
    setting is left.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")
    measured = measured_with(fleet.workers) if measured is None else measured
    chosen = {setting: steps for setting, steps in measured.items() if steps <= most_steps}
    if not chosen:
        raise ValueError(
            f"most-steps must be at least {min(measured.values()):g}, the least measured, got {most_steps:g}"
        )
    found = [_forecast(s, steps, workload, link, fleet, pace, update, overlap) for s, steps in chosen.items()]
    return tuple(sorted(found, key=lambda f: f.seconds))


def check_most_steps(most_steps: float, workers: int) -> None:
    """Raise ValueError if no setting that was measured needs as few steps."""
    least = min(measured_with(workers).values())
    if not most_steps >= least:
        raise ValueError(f"most-steps must be at least {least:g}, the least measured, got {most_steps:g}")


def _forecast(
    setting: Setting,
    steps: float,
    workload: ModelSize,
    link: Link,
    fleet: Fleet,
    pace: Callable[[Compressor, int], Pace],
    update: float,
    overlap: bool,
) -> LocalForecast:
    bound = workload.bind(setting.compressor)
    choice = choose(bound, "direct", d=workload.d, dense=workload.dense + 1, workers=fleet.workers)
    seconds = pace(bound, workload.d).seconds
    coded = compressed(choice.aggregator, workload.d, workload.dense + 1, fleet.workers, seconds)
    header = RingAllGather(HEADER)
    latency, bandwidth = link.parts(coded.cost + header.cost(fleet.workers))
    # Workers wait for the slowest once a round, not once a step: what differs between steps evens out.
    waiting = fleet.waiting / math.sqrt(setting.every)
    compute = fleet.compute + waiting
    fragments = _fragments(setting.every, latency, bandwidth, compute) if overlap else 1
    delay, waited = 0, latency + bandwidth
    if overlap:
        delay, waited = _overlapped(fragments, setting.every, latency, bandwidth, compute)
    wire = choice.aggregator.wire(workload.d, workload.dense + 1, 0, fleet.workers, 4)
    sent = wire.sent + header.wire(0, fleet.workers).sent
    coding = (coded.compression + update) / setting.every
    return LocalForecast(
        setting, delay, fragments, sent / setting.every, compute, waiting, coding, waited / setting.every, steps
    )


def _fragments(every: int, latency: float, bandwidth: float, compute: float) -> int:
    """Return how many fragments to exchange in H = `every` steps of `compute` seconds (see `forecast_local`)."""
    within = max(1, every // _STALE) * compute
    if within > latency:
        needed = max(1, math.ceil(bandwidth / (within - latency)))
        if needed <= every and needed * latency + bandwidth <= every * compute:
            return needed
    return min(range(1, every + 1), key=lambda n: (_overlapped(n, every, latency, bandwidth, compute)[1], n))


def _overlapped(fragments: int, every: int, latency: float, bandwidth: float, compute: float) -> tuple[int, float]:
    """Return the delay of each of `fragments` exchanges, in steps, and the seconds of a round that steps wait."""
    exchange = fragments * latency + bandwidth
    delay = min(every - 1, math.ceil(exchange / fragments / compute)) if compute else every - 1
    return delay, max(0.0, exchange - (every if fragments > 1 else delay) * compute)
