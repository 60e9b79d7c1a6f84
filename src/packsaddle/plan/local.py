"""The plan for local updates on a link: their period, compressor and overlap.

A round comes every H inner steps, and its exchange may overlap the next `delay` of them. How many steps it takes
to the loss of dense training was measured (experiments/race); a setting that was not is not planned with.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packsaddle.comm.aggregators import Work
from packsaddle.comm.cost_model import RingAllGather
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Identity, Sign, TopK
from packsaddle.compressors.registry import describe
from packsaddle.local.lockstep import HEADER
from packsaddle.plan.coding import Pace
from packsaddle.plan.model_size import ModelSize
from packsaddle.plan.step_time import Fleet, Link, compressed


@dataclass(frozen=True)
class Setting:
    """Arguments of `LocalUpdates`."""

    every: int
    compressor: Compressor
    keep_unsent: bool = False
    delay: int = 0


_TWO_BITS = TopK(1 / 2, values="int2")
_SIGN, _TOPK, _SPARSE = Sign(per_tensor=True), TopK(1 / 16, values="int2"), TopK(1 / 48, values="int2")
# Multiples of dense training's steps for the same loss, each setting at its best rate of one grid, for two and four
# workers. Dense training gains more from a larger batch than local updates do. AdamW: experiments/race, "Steps needed";
# a delay was measured at a quarter of the period, and 1 of 2: "Delays".
_ADAMW: Mapping[int, Mapping[Setting, float]] = {
    2: {
        Setting(2, _SIGN, keep_unsent=True): 1.11,
        Setting(2, _TOPK, keep_unsent=True): 1.18,
        Setting(8, Identity()): 1.25,
        Setting(8, _SIGN, keep_unsent=True): 1.27,
        Setting(8, _TOPK, keep_unsent=True): 1.36,
        Setting(32, Identity()): 1.47,
        Setting(32, _SPARSE, keep_unsent=True): 1.68,
        Setting(2, _SIGN, keep_unsent=True, delay=1): 1.13,
        Setting(2, _TOPK, keep_unsent=True, delay=1): 1.2,
        Setting(8, Identity(), delay=2): 1.36,
        Setting(8, _SIGN, keep_unsent=True, delay=2): 1.39,
        Setting(8, _TOPK, keep_unsent=True, delay=2): 1.43,
        Setting(32, Identity(), delay=8): 1.62,
        Setting(32, _SPARSE, keep_unsent=True, delay=8): 1.73,
    },
    4: {
        Setting(2, _SIGN, keep_unsent=True): 1.36,
        Setting(2, _TOPK, keep_unsent=True): 1.49,
        Setting(8, Identity()): 1.63,
        Setting(8, _SIGN, keep_unsent=True): 1.67,
        Setting(8, _TOPK, keep_unsent=True): 1.88,
        Setting(32, Identity()): 2.17,
        Setting(32, _SPARSE, keep_unsent=True): 2.8,
        Setting(2, _SIGN, keep_unsent=True, delay=1): 1.43,
        Setting(8, _SIGN, keep_unsent=True, delay=2): 1.85,
        Setting(8, _TOPK, keep_unsent=True, delay=2): 2.05,
    },
}


# Muon, compared with dense training with Muon: experiments/muon.
_MUON: Mapping[int, Mapping[Setting, float]] = {
    2: {Setting(8, _SIGN, keep_unsent=True): 1.11, Setting(8, _TWO_BITS, keep_unsent=True): 1.09},
    4: {Setting(8, _SIGN, keep_unsent=True): 1.4, Setting(8, _TWO_BITS, keep_unsent=True): 1.17},
}
Inner = Literal["adamw", "muon"]


def measured_with(workers: int, optimizer: Inner = "adamw") -> Mapping[Setting, float]:
    """Return the multiples of dense training's steps for a number of workers; from three on those of four."""
    return (_MUON if optimizer == "muon" else _ADAMW)[2 if workers <= 2 else 4]


@dataclass(frozen=True)
class LocalForecast:
    """The cost of a setting. Seconds are of a mean inner step; `sent` is of the busiest worker, bytes a step."""

    setting: Setting
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
        """Return the setting and its cost as a dict of strings and numbers, for JSON."""
        return {
            "every": self.setting.every,
            "compressor": describe(self.setting.compressor),
            "keep_unsent": self.setting.keep_unsent,
            "delay": self.setting.delay,
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
    optimizer: Inner = "adamw",
    update: float = 0.0,
    most_steps: float = math.inf,
    measured: Mapping[Setting, float] | None = None,
) -> tuple[LocalForecast, ...]:
    """Predict the measured settings that need at most `most_steps` times dense training's steps, the quickest first.

    They were measured with `optimizer` inside. `pace(compressor, d)` says how fast one codes, `update` the time to make
    v and to absorb, in seconds a round. With a delay the model is exchanged in the number of fragments of which steps
    wait the least; without one they wait for all of it. Raises ValueError for fewer than two workers, and if no setting
    is left.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")
    measured = measured_with(fleet.workers, optimizer) if measured is None else measured
    check_most_steps(most_steps, measured)
    chosen = {setting: steps for setting, steps in measured.items() if steps <= most_steps}
    bound = {compressor: workload.bind(compressor) for compressor in (s.compressor for s in chosen)}
    paces = {compressor: pace(b, workload.d).seconds for compressor, b in bound.items()}
    found = [_forecast(s, steps, workload, link, fleet, paces[s.compressor], update) for s, steps in chosen.items()]
    return tuple(sorted(found, key=lambda f: f.seconds))


def check_most_steps(most_steps: float, measured: Mapping[Setting, float]) -> None:
    """Raise ValueError if every setting that was measured needs more steps."""
    least = min(measured.values())
    if not most_steps >= least:
        raise ValueError(f"most-steps must be at least {least:g}, the least measured, got {most_steps:g}")


def _forecast(
    setting: Setting,
    steps: float,
    workload: ModelSize,
    link: Link,
    fleet: Fleet,
    seconds: Callable[[Work], float],
    update: float,
) -> LocalForecast:
    bound, every = workload.bind(setting.compressor), setting.every
    exchange = "direct" if bound.lossless else "auto"
    choice = choose(bound, exchange, d=workload.d, dense=workload.dense + 1, workers=fleet.workers)
    coded = compressed(choice.aggregator, workload.d, workload.dense + 1, fleet.workers, seconds)
    header = RingAllGather(HEADER)
    latency, bandwidth = link.parts(coded.cost + header.cost(fleet.workers))
    # Workers wait for the slowest once a round, not once a step: what differs between steps evens out.
    waiting = fleet.waiting / math.sqrt(every)
    compute = fleet.compute + waiting

    def waited(fragments: int) -> float:
        """Seconds of a round that steps wait: each exchange outlasts its delay, or all of them the round."""
        exchange = fragments * latency + bandwidth
        return max(0.0, exchange - fragments * setting.delay * compute, exchange - every * compute)

    fragments = min(range(1, every + 1 if setting.delay else 2), key=waited)
    wire = choice.aggregator.wire(workload.d, workload.dense + 1, 0, fleet.workers, 4)
    sent = wire.sent + header.wire(0, fleet.workers).sent
    coding = (coded.compression + update) / every
    return LocalForecast(setting, fragments, sent / every, compute, waiting, coding, waited(fragments) / every, steps)
