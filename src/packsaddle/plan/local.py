"""The plan for local updates, i.e. several optimizer steps between two exchanges, on a network link: the number of
steps between exchanges, the compressor, and the overlap."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from packsaddle.comm.aggregators import Work
from packsaddle.comm.cost_model import RingAllGather
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Identity, Rounded, Sign, TopK
from packsaddle.compressors.registry import describe
from packsaddle.local.workers import HEADER
from packsaddle.plan.coding import Pace
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import Fleet, Link, compressed


@dataclass(frozen=True)
class Setting:
    """A combination of arguments of `LocalUpdates`, for which the number of steps to reach a loss was measured."""

    every: int
    compressor: Compressor
    keep_unsent: bool = False
    delay: int = 0


Inner = Literal["adamw", "muon"]
_TWO_BITS = Rounded()
_SIGN, _TOPK, _SPARSE = Sign(per_tensor=True), TopK(1 / 16, values="int2"), TopK(1 / 48, values="int2")
# For each setting and number of workers: the steps that local updates with AdamW need to reach the loss of uncompressed
# ("dense") training with AdamW, divided by the steps of dense training. The learning rate of each setting was tuned on
# the same grid. The ratios grow with the number of workers, since dense training gains more from a larger batch.
# Source: experiments/race, section "Steps needed", and section "Delays" for settings with a delay. In these settings
# `delay` is every / 4, or 1 if `every` is 2.
_ADAMW: Mapping[Setting, Mapping[int, float]] = {
    Setting(2, _SIGN, keep_unsent=True): {2: 1.11, 4: 1.36},
    Setting(2, _TOPK, keep_unsent=True): {2: 1.18, 4: 1.49},
    Setting(8, Identity()): {2: 1.25, 4: 1.63},
    Setting(8, _SIGN, keep_unsent=True): {2: 1.27, 4: 1.67},
    Setting(8, _TOPK, keep_unsent=True): {2: 1.36, 4: 1.88},
    Setting(32, Identity()): {2: 1.47, 4: 2.17},
    Setting(32, _SPARSE, keep_unsent=True): {2: 1.68, 4: 2.8},
    Setting(2, _SIGN, keep_unsent=True, delay=1): {2: 1.13, 4: 1.43},
    Setting(2, _TOPK, keep_unsent=True, delay=1): {2: 1.2},
    Setting(8, Identity(), delay=2): {2: 1.36},
    Setting(8, _SIGN, keep_unsent=True, delay=2): {2: 1.39, 4: 1.85},
    Setting(8, _TOPK, keep_unsent=True, delay=2): {2: 1.43, 4: 2.05},
    Setting(32, Identity(), delay=8): {2: 1.62},
    Setting(32, _SPARSE, keep_unsent=True, delay=8): {2: 1.73},
}

# The same ratios with Muon in place of AdamW, for local updates and for dense training. Source: experiments/muon.
_MUON: Mapping[Setting, Mapping[int, float]] = {
    Setting(4, _TWO_BITS, keep_unsent=True): {8: 1.36},
    Setting(8, Identity()): {2: 1.06, 4: 1.13},
    Setting(8, _SIGN, keep_unsent=True): {2: 1.15, 4: 1.39, 8: 2.16},
    Setting(8, _TWO_BITS, keep_unsent=True): {2: 1.06, 4: 1.18, 8: 1.64},
    Setting(32, Identity()): {2: 1.23, 4: 1.9},
    Setting(32, _SIGN, keep_unsent=True): {2: 1.33, 4: 2.49},
    Setting(32, _TWO_BITS, keep_unsent=True): {2: 1.23, 4: 2.05},
}
_MEASURED: Mapping[Inner, Mapping[Setting, Mapping[int, float]]] = {"adamw": _ADAMW, "muon": _MUON}


def measured_with(workers: int, optimizer: Inner = "adamw") -> Mapping[Setting, float]:
    """Return, for each setting of local updates, the number of steps that it needs to reach a target loss, divided by
    the number of steps that uncompressed training needs to reach the same loss.

    The steps were measured with the inner `optimizer` for a few numbers of workers (see `measured_workers`). The result
    is for the smallest of these numbers that is at least `workers`. If all these numbers are below `workers`, the
    result is for the largest one. Settings that were not measured for this number are left out.
    """
    numbers = measured_workers(optimizer)
    w = next((w for w in numbers if w >= workers), numbers[-1])
    return {setting: steps[w] for setting, steps in _MEASURED[optimizer].items() if w in steps}


def measured_workers(optimizer: Inner = "adamw") -> list[int]:
    """Return the numbers of workers for which the steps of local updates with this inner `optimizer` were measured, the
    smallest number first."""
    return sorted({w for steps in _MEASURED[optimizer].values() for w in steps})


@dataclass(frozen=True)
class LocalForecast:
    """The predicted cost of local updates with one setting. Times are averages in seconds for one inner step. An inner
    step is a step of a worker's own optimizer."""

    setting: Setting
    fragments: int  # number of fragments into which the model is split, each exchanged separately
    sent: float  # bytes per inner step that the busiest worker sends
    compute: float  # seconds of computing
    coding: float  # seconds to compress and decompress
    exchange: float  # seconds of waiting for exchanges to complete
    steps: float  # inner steps that make the progress of one step of uncompressed training

    @property
    def step(self) -> float:
        """Seconds of one inner step, which is a step of a worker's own optimizer."""
        return self.compute + self.coding + self.exchange

    @property
    def seconds(self) -> float:
        """Seconds of training that make the progress of one step of uncompressed training."""
        return self.step * self.steps

    @property
    def computing(self) -> float:
        return self.compute / self.step

    def plain(self) -> dict[str, Any]:
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
    settings: Mapping[Setting, float],
    pace: Callable[[Compressor, int], Pace],
    *,
    update: float = 0.0,
) -> tuple[LocalForecast, ...]:
    """Predict the cost of local updates on a link with each of `settings`. Returns the forecasts, the fastest setting
    first.

    If a setting has a delay, i.e. exchanges overlap with later steps, the model is split into fragments that are
    exchanged separately. Their number is chosen such that steps wait as little as possible for exchanges. Raises
    ValueError for fewer than two workers.

    Args:
        workload: The size of the model.
        link: The network link between the workers.
        fleet: The workers, and the time that they compute in a step.
        settings: The settings to compare, each with the number of steps that it needs, divided by the number of steps
            of uncompressed training. `measured_with` returns measured numbers.
        pace: Maps a compressor and a number of coordinates d to the speed of encoding and decoding.
        update: The seconds in each exchange to compute the compressor's input and the residual.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")
    paces = {c: pace(workload.bind(c), workload.d).seconds for c in dict.fromkeys(s.compressor for s in settings)}
    found = [_forecast(s, steps, workload, link, fleet, paces[s.compressor], update) for s, steps in settings.items()]
    return tuple(sorted(found, key=lambda f: f.seconds))


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
    # Workers also average a flag that marks invalid vectors. It is sent with the uncompressed coordinates.
    dense = workload.dense + 1
    d, workers, itemsize = workload.d, fleet.workers, workload.itemsize
    exchange = "direct" if bound.lossless else "auto"
    choice = choose(bound, exchange, d=d, dense=dense, workers=workers, itemsize=itemsize)
    coded = compressed(choice.aggregator, d, dense, workers, seconds, itemsize)
    header = RingAllGather(HEADER)
    latency, bandwidth = link.parts(coded.cost + header.cost(workers))

    def waited(fragments: int) -> float:
        """Return the seconds per round for which steps wait for exchanges if the model is split into this number of
        fragments, which are exchanged separately. Steps wait if an exchange takes longer than its delay, or if all
        exchanges of a round together take longer than the round."""
        exchange = fragments * latency + bandwidth
        return max(0.0, exchange - fragments * setting.delay * fleet.compute, exchange - every * fleet.compute)

    fragments = min(range(1, every + 1 if setting.delay else 2), key=waited)
    sent = choice.aggregator.most_sent(d, dense, workers, itemsize) + header.wire(0, workers).sent
    coding = (coded.compression + update) / every
    return LocalForecast(setting, fragments, sent / every, fleet.compute, coding, waited(fragments) / every, steps)
