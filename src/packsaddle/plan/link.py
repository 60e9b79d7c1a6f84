"""The plan for a network link: the compressor with which training is predicted to be fastest, compared with
uncompressed ("dense") training."""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import QSGD, Compressor, LowRank, RandomK, Rounded, Sign, TopK
from packsaddle.compressors.registry import describe
from packsaddle.plan.coding import Pace
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import Dense, Fleet, Link, StepTime, compressed

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PATTERN = re.compile(
    r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([kmgt]?)(bit(?:/s|ps)?|bps|b/s)\s*", re.IGNORECASE
)


def parse_rate(text: str) -> float:
    """Parse a rate, and return it in bits per second. Examples are "100mbit", "100 Mbit/s", "100Mbps" and "12.5MB/s".

    The prefixes k, M, G and T, in upper or lower case, are powers of 1000. A capital B in B/s or Bps means bytes, and a
    lower-case b means bits. Raises ValueError if `text` is not such a rate, as "1 BPS" and "1 B/S", or if the rate is
    0.
    """
    match = _PATTERN.fullmatch(text)
    number = float(match[1]) if match else 0.0
    if match is None or match[3] in ("BPS", "B/S") or not 0 < number < float("inf"):
        raise ValueError(f"rate must be positive and have a unit, such as 100mbit, 1gbit or 12.5MB/s, got {text!r}")
    byte = match[3] in ("B/s", "Bps")
    return number * _PREFIXES[match[2].lower()] * (8 if byte else 1)


def slower_rate(text: str) -> float:
    """Parse the rate of a link, and return it in bits per second. If `text` has two rates UP/DOWN, such as
    20mbit/100mbit, the lower one is returned, since every exchange receives as many bytes as it sends. Raises
    ValueError as `parse_rate` does."""
    return min(map(parse_rate, re.split(r"/(?=\s*[\d.])", text, maxsplit=1)))


def format_rate(bits: float) -> str:
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= 0.9995 * unit:
            return f"{float(f'{bits / unit:.3g}'):g} {prefix}bit/s"
    return f"{bits:.3g} bit/s"


Optimizer = Literal["sgd", "adamw", "muon"]


# The numbers of steps that training with each compressor needs to reach the loss of uncompressed training, divided by
# the number of steps of uncompressed training. The learning rate was tuned separately for compressed and uncompressed
# training. Steps were measured in experiments/text for sgd (30 passes over the data), and in experiments/adamw for
# adamw (800 steps, three seeds). Rounded("int4") was measured in experiments/nanogpt, where it needed 1.02 times as
# many steps as QSGD(127). Muon was measured only with local updates.
MEASURED: Mapping[Optimizer, Mapping[Compressor, float]] = {
    "sgd": {TopK(0.01): 1.0, RandomK(0.01): 2.0},
    "adamw": {
        QSGD(127): 1.04,
        Rounded("int4"): 1.06,
        TopK(0.1): 1.5,
        LowRank(4): 1.7,
        TopK(0.01): 2.7,
        Sign(): 3.0,
        QSGD(): 4.0,
    },
    "muon": {},
}
DENSE = "none"


@dataclass(frozen=True)
class Forecast:
    """Predicted bytes and time of a step with one compressor, or with DistributedDataParallel without compression."""

    compressor: str  # constructor call of the compressor; "none": DistributedDataParallel without compression
    exchange: str  # name of the exchange: "all-reduce", "all-gather", "two-way", ...
    sent: int  # bytes per step that the busiest worker sends
    time: StepTime  # seconds of one step, by cause
    steps: float  # number of steps that make the progress of one uncompressed step

    @property
    def is_dense(self) -> bool:
        """True if this is the forecast for DistributedDataParallel without compression."""
        return self.compressor == DENSE

    @property
    def seconds(self) -> float:
        """Seconds of training that make the progress of one uncompressed step."""
        return self.time.total * self.steps


@dataclass(frozen=True)
class Verdict:
    """Forecasts for a link: one for each compressor, and one for DistributedDataParallel without compression."""

    forecasts: tuple[Forecast, ...]  # the fastest first

    @property
    def best(self) -> Forecast:
        """The forecast for the compressor, or for uncompressed training, that is predicted to be fastest."""
        return self.forecasts[0]

    @property
    def dense(self) -> Forecast:
        """The forecast for DistributedDataParallel without compression."""
        return next(f for f in self.forecasts if f.is_dense)

    @property
    def compress(self) -> bool:
        """True if a compressor is faster than DistributedDataParallel without compression."""
        return not self.best.is_dense

    def plain(self) -> list[dict[str, Any]]:
        """Return a list with one dict of plain types, for JSON, for each forecast. In addition to the fields of
        `Forecast`, a dict has "seconds", the seconds of a step, and "seconds_for_a_dense_step", the seconds that make
        the progress of one uncompressed step."""
        return [{**asdict(f), "seconds": f.time.total, "seconds_for_a_dense_step": f.seconds} for f in self.forecasts]


def forecast(
    workload: ModelSize,
    link: Link,
    fleet: Fleet,
    compressors: Mapping[Compressor, float],
    pace: Callable[[Compressor, int], Pace],
    *,
    update: float = 0.0,
) -> Verdict:
    """Predict the time of a training step that exchanges gradients, with each of `compressors` and with DDP without
    compression. For each compressor, the exchange that is fastest on the link is used. Methods are compared by the time
    that makes the progress of one uncompressed step.

    Raises ValueError if the fleet has fewer than two workers, or if a compressor does not support the model.

    Args:
        workload: The size of the model.
        link: The network link between the workers.
        fleet: The workers, and the time that they compute in a step.
        compressors: The compressors to compare, each with the number of steps that it needs, divided by the number of
            steps of uncompressed training. `MEASURED` has measured numbers.
        pace: Maps a compressor and a number of coordinates d to the speed of encoding and decoding.
        update: The seconds by which a step of CompressedSGD is longer than a step of SGD, apart from encoding and
            decoding (see `plan.update_seconds`). They are counted in `StepTime.compression`.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")

    # DDP's ring all-reduce over n workers sends 2 (n - 1) / n times the bytes of the gradients.
    nbytes, itemsize = workload.gradient_bytes, workload.itemsize
    nbytes = itemsize * (workload.d + workload.dense) if nbytes is None else nbytes
    sent = round(2 * (fleet.workers - 1) / fleet.workers * nbytes)
    found = [Forecast(DENSE, "all-reduce", sent, Dense(nbytes).time(link, fleet), 1.0)]

    # For each compressor, find the exchange that is fastest on this link.
    for compressor, steps in compressors.items():
        bound = workload.bind(compressor)
        seconds = pace(bound, workload.d).seconds
        choices = [choose(bound, "direct", d=workload.d, dense=workload.dense, workers=fleet.workers)]
        # A two-way exchange needs at least one coordinate for each worker.
        if choices[0].name == "all-gather" and workload.d >= fleet.workers:
            choices += [choose(bound, "two-way", d=workload.d, dense=workload.dense, workers=fleet.workers)]
        times = []
        for choice in choices:
            coded = compressed(choice.aggregator, workload.d, workload.dense, fleet.workers, seconds, itemsize)
            times.append(replace(coded, compression=coded.compression + update).time(link, fleet))
        time, choice = min(zip(times, choices, strict=True), key=lambda pair: pair[0].total)
        sent = choice.aggregator.most_sent(workload.d, workload.dense, fleet.workers, itemsize)
        found.append(Forecast(describe(compressor), choice.name, sent, time, steps))
    return Verdict(tuple(sorted(found, key=lambda f: f.seconds)))
