"""The time of one training step: computing, waiting for the slowest worker, coding, and the exchange.

A message of n bytes takes latency + n / rate seconds (the alpha-beta model), on links that are busy both ways at once;
`cost_model` says how many messages wait for one another and what crosses the busiest link. It is a model of a step,
not of a run: compressors need different numbers of steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal, get_args

from packsaddle.comm.aggregators import Aggregator, Work
from packsaddle.comm.cost_model import Cost, RingAllReduce

FRAMING = 1448 / 1514  # of an Ethernet frame of 1,514 bytes, what TCP over IP leaves to its user
LATENCY = 1e-4  # seconds of a small message, gloo's over a local network
Tail = Literal["lognormal", "exponential"]
_MOST = 1e9  # seconds, and standard deviations: sums and squares of larger ones may overflow


@dataclass(frozen=True)
class Link:
    """The link between a worker and the others. Raises ValueError unless rate > 0 and times are from 0 to 1e9 seconds.

    >>> from packsaddle.plan import Link
    >>> link = Link.nominal(100e6, latency=1e-4)
    >>> round(link.rate / 1e6, 2)
    11.96
    """

    latency: float  # seconds from the start of a small message to its end, software included
    rate: float  # payload bytes a second, each way
    overhead: float = 1e-5  # seconds of each further message that leaves or arrives together with another

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate of a link must be positive, in bytes a second, got {self.rate}")
        for name in ("latency", "overhead"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} of a link must be from 0 to {_MOST:g} seconds, got {getattr(self, name)}")

    @classmethod
    def nominal(cls, bits: float, latency: float) -> "Link":
        """Return the link of a nominal rate in bits a second, less its headers, and a `latency` in seconds."""
        return cls(latency, bits / 8 * FRAMING)

    @property
    def bits(self) -> float:
        """The nominal rate, bits a second, headers included."""
        return self.rate / FRAMING * 8

    def parts(self, cost: Cost) -> tuple[float, float]:
        """Return the seconds of a cost that latency takes, and those that the rate takes."""
        return cost.hops * self.latency + cost.fan * self.overhead, cost.bytes / self.rate


@dataclass(frozen=True)
class Fleet:
    """The workers, which compute independently, for `compute` seconds in the mean, standard deviation spread x compute.

    Raises ValueError unless workers is at least 1, compute and spread are from 0 to 1e9, and spread is at most 1 with
    the tail "exponential".

    >>> from packsaddle.plan import Fleet
    >>> round(Fleet(workers=8, compute=0.1, spread=0.2).waiting, 4)
    0.031
    """

    workers: int  # W
    compute: float  # seconds of forward and backward pass, the mean
    spread: float = 0.0  # standard deviation of that time over its mean
    tail: Tail = "lognormal"  # the distribution of that time: "lognormal" or "exponential"

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        for name in ("compute", "spread"):
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} must be from 0 to {_MOST:g}, got {getattr(self, name)}")
        if self.tail not in get_args(Tail):
            raise ValueError(f"tail must be one of {', '.join(get_args(Tail))}, got {self.tail!r}")
        if self.tail == "exponential" and self.spread > 1:
            raise ValueError(f"spread of an exponential tail must be at most 1, got {self.spread}")

    @property
    def waiting(self) -> float:
        """Seconds that the mean worker waits for the slowest of the W, in expectation."""
        return self.compute * (expected_maximum(self.workers, self.spread, self.tail) - 1)


@cache
def expected_maximum(workers: int, spread: float, tail: Tail = "lognormal") -> float:
    """Return the expected maximum of `workers` independent times of mean 1 and standard deviation `spread`.

    The `tail` "exponential": 1 - spread + an exponential time; its maximum is spread * H_W above the least (Renyi
    1953). "lognormal": by quadrature over the normal score of the slowest.

    >>> from packsaddle.plan.step_time import expected_maximum
    >>> round(expected_maximum(8, 0.2), 3), expected_maximum(8, 0.0)
    (1.31, 1.0)
    """
    if workers == 1 or spread == 0:
        return 1.0
    from scipy.integrate import quad  # slow to import, and only uneven workers need it
    from scipy.special import digamma, log_ndtr, ndtri

    if tail == "exponential":
        return 1 - spread + spread * float(digamma(workers + 1) - digamma(1))
    sigma = math.sqrt(math.log1p(spread**2))

    def integrand(z: float) -> float:
        log_density = math.log(workers / math.sqrt(2 * math.pi)) - z**2 / 2 + (workers - 1) * log_ndtr(z)
        return math.exp(sigma * z - sigma**2 / 2 + log_density)

    centre = float(ndtri(1 - 1 / workers))  # about where the slowest is
    return float(quad(integrand, centre - 8, centre + 10 + sigma, limit=200)[0])


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they go to; `total` is their sum.

    >>> from packsaddle.plan import StepTime
    >>> round(StepTime(compute=0.1, waiting=0.0, compression=0.01, latency=0.001, bandwidth=0.02).total, 3)
    0.131
    """

    compute: float  # forward and backward pass
    waiting: float  # for the slowest worker
    compression: float  # coding, and the optimizer's other work
    latency: float  # the exchange: messages that wait for one another
    bandwidth: float  # the exchange: bytes through the busiest link

    @property
    def exchange(self) -> float:
        """Latency and bandwidth."""
        return self.latency + self.bandwidth

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return self.compute + self.waiting + self.compression + self.exchange


class Step(ABC):
    """A way to make a step, given the link and the workers."""

    @abstractmethod
    def time(self, link: Link, fleet: Fleet) -> StepTime:
        """Predict its time."""


@dataclass(frozen=True)
class Compressed(Step):
    """Compute, then code, then exchange, as `CompressedSGD` does."""

    cost: Cost
    compression: float  # seconds

    def time(self, link: Link, fleet: Fleet) -> StepTime:
        return StepTime(fleet.compute, fleet.waiting, self.compression, *link.parts(self.cost))


@dataclass(frozen=True)
class Fastest(Step):
    """Of several ways the one that takes the least time on a link."""

    steps: tuple[Step, ...]

    def time(self, link: Link, fleet: Fleet) -> StepTime:
        return min((step.time(link, fleet) for step in self.steps), key=lambda time: time.total)


@dataclass(frozen=True)
class Dense(Step):
    """DistributedDataParallel: `nbytes` bytes all-reduced in buckets, during the backward pass or after it."""

    nbytes: int
    overlap: bool = True
    bucket: int = 25 * 2**20  # bytes, torch's default
    backward: float = 2 / 3  # of the computing

    def time(self, link: Link, fleet: Fleet) -> StepTime:
        """Buckets become ready evenly along the backward pass and are sent one after another.

        So what is waited for is the last bucket or, on a slow link, all but what fitted into the backward pass.
        """
        buckets = max(1, math.ceil(self.nbytes / self.bucket))
        latency, bandwidth = link.parts(RingAllReduce((self.nbytes,)).cost(fleet.workers))
        latency *= buckets
        everything = latency + bandwidth
        hidden = fleet.compute * self.backward * (1 - 1 / buckets) if self.overlap else 0.0
        least = everything / buckets if self.overlap else everything
        share = max(least, everything - hidden) / everything if everything else 0.0
        return StepTime(fleet.compute, fleet.waiting, 0.0, latency * share, bandwidth * share)


Seconds = Callable[[Work], float]  # of the coding that a piece of work says


def compressed(
    aggregator: Aggregator, d: int, dense: int, workers: int, seconds: Seconds, itemsize: int = 4
) -> Compressed:
    """Return an aggregator's step, which exchanges d compressed and `dense` dense coordinates of `itemsize` bytes."""
    cost = sum((c.cost(workers) for c in aggregator.collectives(d, dense, workers, itemsize)), Cost())
    return Compressed(cost, sum(seconds(work) for work in aggregator.work(d, workers)))


def break_even(step: Step, dense: Step, link: Link, fleet: Fleet, steps: float = 1.0) -> float | None:
    """Return the rate, payload bytes a second, at which `steps` of one take as long as one of the dense ones.

    The latency is the link's. `step` takes less on links slower than that. None if it never does, or always: compare
    them on any link to tell.
    """

    def pays(rate: float) -> bool:
        slower = replace(link, rate=rate)
        return steps * step.time(slower, fleet).total < dense.time(slower, fleet).total

    rates = [10.0**exponent for exponent in range(16)]  # a byte a second to a petabyte a second
    if not pays(rates[0]):
        return None
    above = next((rate for rate in rates if not pays(rate)), None)
    return None if above is None else bisect(pays, above / 10, above)


def bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `holds`, true at `low` and false at `high`, changes, by halving the logarithm of the interval."""
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
