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
_ENOUGH = 0.5  # seconds; an all-reduce that takes at least this long is used to measure the rate
_MOST = 1 << 26  # largest size of an all-reduce, in bytes
_LARGE = 5  # number of all-reduces of the largest message, to measure the rate


def probe(group: Group, device: torch.device | str = "cpu") -> Link:
    """Measure the latency and the rate of the link between the workers of `group`, by all-reduces of tensors on
    `device`; collective.

    The latency is fitted to the median time of small all-reduces, and the rate to the median time of large all-reduces.
    Both results are identical on all workers. Raises ValueError if `group` has only one worker. Raises RuntimeError if
    a large message takes no longer than a small one, since no rate can then be computed.

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
    """Time `repeats` all-reduces of `elements` float32 numbers on `device`; collective. Each worker computes the median
    of its times. Returns the mean of these medians over the workers, in seconds."""
    tensor = torch.zeros(elements, device=device)
    group.all_reduce(tensor)  # warm-up: connects, allocates and synchronizes
    taken = torch.tensor(median(clocked(lambda: group.all_reduce(tensor)) for _ in range(repeats)))
    shared = taken.to(device)
    group.all_reduce(shared)
    return float(shared) / group.size


def probe_locally(workers: int) -> Link:
    """Start `workers` processes on this machine, and return the measured link between them. They communicate by NCCL if
    the machine has a GPU for each process, and by gloo otherwise."""
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


@dataclass(frozen=True)
class StepsNeeded:
    """The number of steps that compressed training needs to reach the loss of uncompressed training. It is `factor`
    times the number of steps of uncompressed training. The learning rate was tuned separately for compressed and
    uncompressed training."""

    factor: float
    at_least: bool = False  # True if `factor` is a lower bound, since training ended before it reached the loss


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
    """Return the number of steps that training with this compressor needs, relative to uncompressed training with the
    same `optimizer`. It is 1 for lossless compressors, and for all compressors if `optimizer` is None. Otherwise it is
    the measured number. Returns None if the number was not measured."""
    if optimizer is None or compressor.lossless:
        return StepsNeeded(1.0)
    return MEASURED[optimizer].get(compressor)


DENSE = "none"


@dataclass(frozen=True)
class Forecast:
    """Predicted bytes and time of a step with one compressor, or with DistributedDataParallel without compression."""

    compressor: str  # constructor call of the compressor; "none": DistributedDataParallel without compression
    exchange: str  # name of the exchange: "all-reduce", "all-gather", "two-way", ...
    sent: int  # bytes per step that the busiest worker sends
    time: StepTime  # seconds of one step, by cause
    break_even: float | None  # payload bytes/s below which compression beats DDP; None: it always or never beats DDP
    steps: StepsNeeded | None  # number of steps that make the progress of one uncompressed step; None: not measured

    @property
    def is_dense(self) -> bool:
        """True if this is the forecast for DistributedDataParallel without compression."""
        return self.compressor == DENSE

    @property
    def is_known(self) -> bool:
        """True if the number of steps that make the progress of one uncompressed step, `steps`, was measured exactly.
        If only a lower bound was measured, the result is False."""
        return self.steps is not None and not self.steps.at_least

    @property
    def seconds(self) -> float:
        """Seconds of training that make the progress of one uncompressed step. If the number of `steps` for this
        progress was not measured, these are the seconds of one step."""
        return self.time.total * (self.steps.factor if self.steps else 1.0)


@dataclass(frozen=True)
class Verdict:
    """Forecasts for a link, the fastest first: one for each compressor, and one for DistributedDataParallel without
    compression. The forecasts of some compressors are last, however fast: those for which the number of steps,
    relative to uncompressed training, was not measured, or for which only a lower bound on this number is known."""

    forecasts: tuple[Forecast, ...]  # one forecast for each method, the fastest first (see the class)

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
    compressors: Sequence[Compressor],
    pace: Callable[[Compressor, int], Pace],
    *,
    update: float = 0.0,
    overlap: bool = True,
    optimizer: Optimizer | None = None,
) -> Verdict:
    """Predict the time of a training step that exchanges gradients, with each of `compressors` and with DDP without
    compression. For each compressor, the exchange that is fastest on the link is used.

    Raises ValueError if the fleet has fewer than two workers, or if a compressor does not support the model.

    Args:
        workload: The size of the model.
        link: The network link between the workers.
        fleet: The workers, and the time that they compute in a step.
        compressors: The compressors to compare.
        pace: Maps a compressor and a number of coordinates d to the speed of encoding and decoding.
        update: The seconds by which a step of CompressedSGD is longer than a step of SGD, apart from encoding and
            decoding (see `plan.update_seconds`). They are counted in `StepTime.compression`.
        overlap: True: DDP's exchange runs during the backward pass. False: it runs after the backward pass.
        optimizer: If given, methods are compared by the time that makes the progress of one uncompressed step. The
            number of steps for this progress was measured with this optimizer, for some compressors (`MEASURED`). If
            None, methods are compared by the time of one step.
    """
    if fleet.workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {fleet.workers}")

    # DDP's ring all-reduce over n workers sends 2 (n - 1) / n times the bytes of the gradients.
    nbytes, itemsize = workload.gradient_bytes, workload.itemsize
    nbytes = itemsize * (workload.d + workload.dense) if nbytes is None else nbytes
    dense = Dense(nbytes, overlap)
    sent = round(2 * (fleet.workers - 1) / fleet.workers * nbytes)
    found = [Forecast(DENSE, "all-reduce", sent, dense.time(link, fleet), None, StepsNeeded(1.0))]

    # For each compressor, find the exchange that is fastest on this link. Find the break-even rate separately, since
    # another exchange may be fastest at that rate.
    for compressor in compressors:
        bound = workload.bind(compressor)
        seconds = pace(bound, workload.d).seconds
        steps: list[tuple[Choice, Step]] = []
        choices = [choose(bound, "direct", d=workload.d, dense=workload.dense, workers=fleet.workers)]
        # A two-way exchange needs at least one coordinate for each worker.
        if choices[0].name == "all-gather" and workload.d >= fleet.workers:
            choices += [choose(bound, "two-way", d=workload.d, dense=workload.dense, workers=fleet.workers)]
        for choice in choices:
            coded = compressed(choice.aggregator, workload.d, workload.dense, fleet.workers, seconds, itemsize)
            steps.append((choice, replace(coded, compression=coded.compression + update)))
        choice, step = min(steps, key=lambda s: s[1].time(link, fleet).total)
        sent = choice.aggregator.most_sent(workload.d, workload.dense, fleet.workers, itemsize)
        needed = steps_needed(compressor, optimizer)
        # At each rate of the link, the break-even rate considers the exchange that is fastest at that rate.
        kinds = [step for _, step in steps]
        equal = break_even(kinds, dense, link, fleet, needed.factor if needed else 1.0)
        found.append(Forecast(describe(compressor), choice.name, sent, step.time(link, fleet), equal, needed))
    return Verdict(tuple(sorted(found, key=lambda f: (not f.is_known, f.seconds))))
