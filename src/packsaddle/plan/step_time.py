"""A model of the time of one training step: compute, coding, and the exchange.

A message of n bytes takes latency + n / rate seconds (the alpha-beta model) on full-duplex links. Module `cost_model`
computes the number of sequential messages of an exchange, and the exchange's bytes over the busiest link. The model
predicts only the time of a step. The time of a run also depends on the number of steps, which differs between
compressors.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from packsaddle.comm.aggregators import Aggregator, Work
from packsaddle.comm.cost_model import Cost, RingAllReduce
from packsaddle.options.numerals import duration

FRAMING = 1448 / 1514  # TCP/IP payload as a fraction of an Ethernet frame of 1,514 bytes
LATENCY = 1e-4  # seconds for a small message, typical of gloo in a local network
_MOST = 1e9  # largest valid time, in seconds; squares of larger values may overflow


@dataclass(frozen=True)
class Link:
    """The network link between a worker and the other workers. Times are numbers of seconds, or text such as "55ms".

    Raises ValueError unless `rate` is above 0, and `latency` and `overhead` are from 0 to 1e9 seconds.

    >>> from packsaddle.plan import Link
    >>> link = Link.nominal(100e6, latency=1e-4)
    >>> round(link.rate / 1e6, 2)
    11.96
    """

    latency: float  # seconds that a small message takes, including the time of the software
    rate: float  # payload bytes per second in each direction
    overhead: float = 1e-5  # seconds for each message concurrent with the sequential messages (`Cost.fan`)

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise ValueError(f"rate of a link must be positive, in bytes a second, got {self.rate}")
        for name in ("latency", "overhead"):
            object.__setattr__(self, name, duration(getattr(self, name), name))
            if not 0 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} of a link must be from 0 to {_MOST:g} seconds, got {getattr(self, name)}")

    @classmethod
    def nominal(cls, bits: float, latency: float | str) -> "Link":
        """Return the link with this `latency` and a nominal rate of `bits` per second. The nominal rate counts packet
        headers too, so it is above `rate`, which counts only payload."""
        return cls(duration(latency, "latency"), bits / 8 * FRAMING)

    @property
    def bits(self) -> float:
        """The nominal rate in bits per second. It counts packet headers too, unlike `rate`, which counts only
        payload."""
        return self.rate / FRAMING * 8

    def parts(self, cost: Cost) -> tuple[float, float]:
        """Return the two parts of the time of an exchange, in seconds: its latency, and the time to transfer its bytes.
        `cost` contains the numbers of messages and bytes of the exchange."""
        return cost.hops * self.latency + cost.fan * self.overhead, cost.bytes / self.rate


@dataclass(frozen=True)
class Fleet:
    """The workers of a run, which all compute equally fast.

    `compute` is a number of seconds, or text such as "55ms". Raises ValueError unless workers is at least 1, and
    compute is from 0 to 1e9.

    >>> from packsaddle.plan import Fleet
    >>> Fleet(workers=8, compute="55ms").compute
    0.055
    """

    workers: int  # number of workers W
    compute: float  # seconds of the forward and backward pass

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, got {self.workers}")
        object.__setattr__(self, "compute", duration(self.compute, "compute"))
        if not 0 <= self.compute <= _MOST:
            raise ValueError(f"compute must be from 0 to {_MOST:g}, got {self.compute}")


@dataclass(frozen=True)
class StepTime:
    """The seconds of one training step, divided by cause. `total` is their sum.

    >>> from packsaddle.plan import StepTime
    >>> round(StepTime(compute=0.1, compression=0.01, latency=0.001, bandwidth=0.02).total, 3)
    0.131
    """

    compute: float  # time of the forward and backward pass
    compression: float  # time of encoding, of decoding, and of the rest of the optimizer's step
    latency: float  # latency of the exchange's sequential messages
    bandwidth: float  # time to transfer the exchange's bytes over the busiest link

    @property
    def exchange(self) -> float:
        """The time of the exchange in seconds: latency plus bandwidth."""
        return self.latency + self.bandwidth

    @property
    def total(self) -> float:
        """The total time of the step in seconds."""
        return self.compute + self.compression + self.exchange


@dataclass(frozen=True)
class Compressed:
    """Model of the time of a step of `CompressedSGD`: computing, coding (encoding and decoding) and the exchange are
    sequential, without overlap."""

    cost: Cost  # messages and bytes on the critical path of the exchange
    compression: float  # seconds of encoding, of decoding, and of the rest of the optimizer's step

    def time(self, link: Link, fleet: Fleet) -> StepTime:
        """Predict the time of one step of the workers in `fleet` on `link`."""
        return StepTime(fleet.compute, self.compression, *link.parts(self.cost))


@dataclass(frozen=True)
class Dense:
    """Model of a step of DistributedDataParallel without compression, which all-reduces the gradients in buckets."""

    nbytes: int  # bytes of the gradients
    overlap: bool = True  # True: exchange during the backward pass; False: after it
    bucket: int = 25 * 2**20  # size of a bucket in bytes; this is torch's default
    backward: float = 2 / 3  # time of the backward pass, as a fraction of the compute time

    def time(self, link: Link, fleet: Fleet) -> StepTime:
        """Predict the time of a step on `link`, for the workers of `fleet`.

        With `overlap`, buckets become ready at equal intervals of the backward pass, and are sent sequentially. The
        last bucket is sent after the backward pass. On a slow link, some of the earlier buckets are also sent after the
        backward pass. The latency and bandwidth in the result count only the time after the backward pass.
        """
        buckets = max(1, math.ceil(self.nbytes / self.bucket))
        latency, bandwidth = link.parts(RingAllReduce((self.nbytes,)).cost(fleet.workers))
        latency *= buckets
        everything = latency + bandwidth
        hidden = fleet.compute * self.backward * (1 - 1 / buckets) if self.overlap else 0.0
        least = everything / buckets if self.overlap else everything
        share = max(least, everything - hidden) / everything if everything else 0.0
        return StepTime(fleet.compute, 0.0, latency * share, bandwidth * share)


Step = Compressed | Dense
Seconds = Callable[[Work], float]  # maps numbers of encode, decode and add operations to their seconds


def compressed(
    aggregator: Aggregator, d: int, dense: int, workers: int, seconds: Seconds, itemsize: int = 4
) -> Compressed:
    """Return the model of a step of `CompressedSGD` with this `aggregator`, the method of averaging over `workers`. The
    step exchanges d compressed and `dense` uncompressed coordinates of `itemsize` bytes. `seconds` returns the time of
    encoding and decoding operations."""
    cost = sum((c.cost(workers) for c in aggregator.collectives(d, dense, workers, itemsize)), Cost())
    return Compressed(cost, sum(seconds(work) for work in aggregator.work(d, workers)))
