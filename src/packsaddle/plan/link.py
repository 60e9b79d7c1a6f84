"""The plan for a network link: the compressor with which training is predicted to be fastest, compared with
uncompressed ("dense") training."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

import torch

from packsaddle.comm.devices import local_device
from packsaddle.comm.group import Group
from packsaddle.comm.launching import launch, process_group
from packsaddle.comm.select_aggregator import Choice, choose
from packsaddle.compressors import QSGD, Compressor, LowRank, RandomK, Rounded, Sign, TopK
from packsaddle.compressors.registry import describe
from packsaddle.plan.coding import Pace
from packsaddle.plan.model import ModelSize
from packsaddle.plan.step_time import Dense, Fleet, Link, Step, StepTime, break_even, compressed
from packsaddle.plan.timing import clocked

_SMALL = 20  # number of all-reduces of one element, to measure the latency
_ENOUGH = 0.5  # an all-reduce of this many seconds is long enough to measure the rate
_MOST = 1 << 26  # largest size of an all-reduce, in bytes
_LARGE = 5  # number of all-reduces of the largest message, to measure the rate


def probe(group: Group, device: torch.device | str = "cpu") -> Link:
    """Measure latency and rate of the link between workers of `group` by all-reduces on `device`; collective.

    The latency is fitted to the median time of small all-reduces, and the rate to the median time of large all-reduces.
    Both results are identical on all workers. Raises ValueError for one worker, and RuntimeError if a large message
    takes no longer than a small one, so that no rate can be computed.

    >>> from packsaddle import simulate
    >>> from packsaddle.comm.group import resolve
    >>> from packsaddle.plan.link import probe
    >>> simulate(lambda rank: probe(resolve(None)).rate > 0, 2)
    [True, True]
    """
    if group.size < 2:
        raise ValueError(f"measuring a link needs at least 2 workers, got {group.size}")
    hops = 2 * (group.size - 1)
    small = _seconds(group, 1, _SMALL, device)
    nbytes = 1 << 16
    while (large := _seconds(group, nbytes // 4, 1, device)) < _ENOUGH and nbytes < _MOST:
        nbytes *= 2
    large = _seconds(group, nbytes // 4, _LARGE, device)
    if large <= small:
        raise RuntimeError(
            f"the rate of the link cannot be measured: {nbytes} bytes took no longer than 4 bytes ({large:.2g} s)"
        )
    per_byte = (large - small) / (hops / group.size * (nbytes - 4))
    return Link(max(0.0, small / hops - 4 / group.size * per_byte), 1 / per_byte)


def _seconds(group: Group, elements: int, repeats: int, device: torch.device | str) -> float:
    """Return the median seconds of `repeats` all-reduces of `elements` float32 numbers on `device`, averaged over
    workers; collective."""
    tensor = torch.zeros(elements, device=device)
    group.all_reduce(tensor)  # warm-up: connects, allocates and synchronizes
    taken = torch.tensor(median(clocked(lambda: group.all_reduce(tensor)) for _ in range(repeats)))
    shared = taken.to(device)
    group.all_reduce(shared)
    return float(shared) / group.size


def probe_locally(workers: int) -> Link:
    """Start `workers` processes on this machine, and measure the link between them. They communicate by NCCL if the
    machine has a GPU for each process, and by gloo otherwise."""
    found: Link = launch(_probe_world, (), workers)
    return found


def _probe_world() -> Link:
    with process_group() as group:
        return probe(group, local_device())


_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_PATTERN = re.compile(
    r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?)\s*([kmgt]?)(bit(?:/s|ps)?|bps|b/s)\s*", re.IGNORECASE
)


def parse_rate(text: str) -> float:
    """Parse a rate, such as "100mbit" (also Mbit/s, Mbps) or "12.5MB/s", to bits per second.

    The prefixes k, M, G and T, in upper or lower case, are powers of 1000. A capital B in B/s or Bps means bytes, and a
    lower-case b means bits. Raises ValueError for other texts, such as "1 BPS" or "1 B/S", and for a rate of 0.
    """
    match = _PATTERN.fullmatch(text)
    number = float(match[1]) if match else 0.0
    if match is None or match[3] in ("BPS", "B/S") or not 0 < number < float("inf"):
        raise ValueError(f"rate must be positive and have a unit, such as 100mbit, 1gbit or 12.5MB/s, got {text!r}")
    byte = match[3] in ("B/s", "Bps")
    return number * _PREFIXES[match[2].lower()] * (8 if byte else 1)


def slower_rate(text: str) -> float:
    """Parse the rate of a link to bits per second. Of two rates UP/DOWN, such as 20mbit/100mbit, return the lower one,
    since every exchange receives as many bytes as it sends. Raises ValueError as `parse_rate` does."""
    return min(map(parse_rate, re.split(r"/(?=\s*[\d.])", text, maxsplit=1)))


def format_rate(bits: float) -> str:
    for prefix, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if bits >= 0.9995 * unit:
            return f"{float(f'{bits / unit:.3g}'):g} {prefix}bit/s"
    return f"{bits:.3g} bit/s"


Optimizer = Literal["sgd", "adamw", "muon"]


@dataclass(frozen=True)
class StepsNeeded:
    """The number of steps with which compressed training reaches the loss of uncompressed training, as a multiple of
    the steps of uncompressed training. The learning rate was tuned separately for compressed and uncompressed
    training."""

    factor: float
    at_least: bool = False  # True if `factor` is a lower bound, as the measurement ended before the loss was reached


# Steps were measured in experiments/text for sgd (30 passes over the data), and in experiments/adamw for adamw (800
# steps, three seeds). Rounded("int4") was measured in experiments/nanogpt, where it needed 1.02 times as many steps as
# QSGD(127). Muon was measured only with local updates.
MEASURED: Mapping[Optimizer, Mapping[Compressor, StepsNeeded]] = {
    "sgd": {TopK(0.01): StepsNeeded(1.0), RandomK(0.01): StepsNeeded(2.0)},
    "adamw": {
        QSGD(127): StepsNeeded(1.04),
        Rounded("int4"): StepsNeeded(1.06),
        TopK(0.1): StepsNeeded(1.5),
        LowRank(4): StepsNeeded(1.7),
        TopK(0.01): StepsNeeded(2.7),
        Sign(): StepsNeeded(3.0),
        QSGD(): StepsNeeded(4.0),
        RandomK(0.1): StepsNeeded(4.0, at_least=True),
    },
    "muon": {},
}


def steps_needed(compressor: Compressor, optimizer: Optimizer | None) -> StepsNeeded | None:
    """Return the number of steps that training with this compressor needs, relative to uncompressed training. It is 1
    for lossless compressors and if `optimizer` is None. Otherwise it is the measured number, or None if it was not
    measured."""
    if optimizer is None or compressor.lossless:
        return StepsNeeded(1.0)
    return MEASURED[optimizer].get(compressor)


DENSE = "none"


@dataclass(frozen=True)
class Forecast:
    """Predicted bytes and time of a step with one compressor, or with DistributedDataParallel without compression."""

    compressor: str  # "none" for DistributedDataParallel
    exchange: str  # "all-reduce", "all-gather", "two-way", ...
    sent: int  # bytes per step that the busiest worker sends
    time: StepTime  # seconds of one step, by cause
    break_even: float | None  # rate in bytes/s below which compression beats DDP; None: at every rate, or at none
    steps: StepsNeeded | None  # number of steps that make the progress of one uncompressed step; None: not measured

    @property
    def is_dense(self) -> bool:
        """True if this is the forecast for DistributedDataParallel without compression."""
        return self.compressor == DENSE

    @property
    def is_known(self) -> bool:
        """True if `steps`, the number of steps that make the progress of one uncompressed step, was measured and is not
        only a lower bound."""
        return self.steps is not None and not self.steps.at_least

    @property
    def seconds(self) -> float:
        """Seconds to make the progress of one uncompressed step. If `steps` was not measured, this is the time of one
        step."""
        return self.time.total * (self.steps.factor if self.steps else 1.0)


@dataclass(frozen=True)
class Verdict:
    """Forecasts for all compressors on a link, and for DistributedDataParallel without compression, the fastest first.
    Forecasts of compressors whose number of steps was not measured, or of which only a lower bound is known, are
    last."""

    forecasts: tuple[Forecast, ...]  # one for each compressor, and one for DDP without compression

    @property
    def best(self) -> Forecast:
        """The forecast for the fastest method."""
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
        """Return the forecasts as plain types for JSON, with the total seconds of a step."""
        return [{**asdict(f), "seconds": f.time.total, "seconds_for_a_dense_step": f.seconds} for f in self.forecasts]


def forecast(
    workload: ModelSize,
    link: Link,
    fleet: Fleet,
    compressors: Sequence[Compressor],
    pace: Callable[[Compressor, int], Pace],
    *,
    update: float = 0.0,
    overlap: bool = True,
    optimizer: Optimizer | None = None,
) -> Verdict:
    """Predict the time of a training step that exchanges float32 gradients, for each of `compressors` in its fastest
    exchange, and for DDP without compression.

    `workload` is the size of the model, exchanged over `link` by the workers of `fleet`; with `overlap`, DDP's exchange
    runs during the backward pass. `pace(compressor, d)` returns the speed of encoding and decoding. `update` is the
    time in seconds by which a step of CompressedSGD is longer than one of SGD, apart from encoding and decoding (see
    `plan.update_seconds`). Encoding, decoding and `update` count as compression.

    If an `optimizer` is given, compressors are compared by the time of the steps that make the progress of one
    uncompressed step. The number of these steps was measured for each compressor with the optimizer (`MEASURED`).
    Raises ValueError for fewer than two workers, or for a compressor that does not support the model.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")

    # DDP's ring all-reduce over n workers sends 2 (n - 1) / n times the bytes of the float32 gradients.
    nbytes = 4 * (workload.d + workload.dense)
    dense = Dense(nbytes, overlap)
    sent = round(2 * (fleet.workers - 1) / fleet.workers * nbytes)
    found = [Forecast(DENSE, "all-reduce", sent, dense.time(link, fleet), None, StepsNeeded(1.0))]

    # The forecast uses the exchange that is fastest on this link. The break-even rate compares DDP with the exchange
    # that is fastest at the rate in question.
    for compressor in compressors:
        bound = workload.bind(compressor)
        seconds = pace(bound, workload.d).seconds
        steps: list[tuple[Choice, Step]] = []
        choices = [choose(bound, "direct", d=workload.d, dense=workload.dense, workers=fleet.workers)]
        # A two-way exchange needs at least one coordinate for each worker.
        if choices[0].name == "all-gather" and workload.d >= fleet.workers:
            choices += [choose(bound, "two-way", d=workload.d, dense=workload.dense, workers=fleet.workers)]
        for choice in choices:
            coded = compressed(choice.aggregator, workload.d, workload.dense, fleet.workers, seconds)
            steps.append((choice, replace(coded, compression=coded.compression + update)))
        choice, step = min(steps, key=lambda s: s[1].time(link, fleet).total)
        sent = choice.aggregator.most_sent(workload.d, workload.dense, fleet.workers, 4)
        needed = steps_needed(compressor, optimizer)
        # The break-even rate is computed from all exchanges, since it depends on the link rate which exchange is
        # fastest.
        kinds = [step for _, step in steps]
        equal = break_even(kinds, dense, link, fleet, needed.factor if needed else 1.0)
        found.append(Forecast(describe(compressor), choice.name, sent, step.time(link, fleet), equal, needed))
    return Verdict(tuple(sorted(found, key=lambda f: (not f.is_known, f.seconds))))
