"""Measures the speed of compressors on this machine, for forecasts of step times and for a table that compares
compressors."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Work
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import describe
from packsaddle.plan.timing import side_by_side

_SHORT = 4096  # number of coordinates of the short test vector, for which the fixed cost of a call dominates
LONGEST = 1 << 25  # largest number of coordinates that is timed; times of longer vectors are extrapolated


@dataclass(frozen=True)
class Line:
    """The time of a compressor's operation on a vector, in seconds, as a linear function of the number of
    coordinates."""

    fixed: float  # seconds per call
    per_coordinate: float  # additional seconds per coordinate

    @classmethod
    def through(cls, a: tuple[int, float], b: tuple[int, float]) -> "Line":
        """Return the line through the points a and b. A point is a pair (coordinates, seconds). If both points have the
        same number of coordinates, the line through b and the origin is returned. A slope or a fixed time below 0 is
        replaced by 0."""
        slope = (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else b[1] / b[0]
        slope = max(0.0, slope)
        return cls(max(0.0, b[1] - slope * b[0]), slope)

    def at(self, coordinates: int) -> float:
        return self.fixed + self.per_coordinate * coordinates


@dataclass(frozen=True)
class Pace:
    """The speed of a compressor: the seconds to encode, decode or add one message as functions of the number of
    coordinates."""

    encode: Line  # time to compress a vector
    decode: Line  # time to decode a received message, and add it to a vector
    add: Line  # time to add a message to a vector if the message's `context` has been computed before

    def seconds(self, work: Work) -> float:
        n = work.coordinates
        return work.encode * self.encode.at(n) + work.decode * self.decode.at(n) + work.add * self.add.at(n)


def measure(compressor: Compressor, d: int, *, repeats: int = 5, device: torch.device | str = "cpu") -> Pace:
    """Return the pace, i.e. the speed, of a compressor. It is measured on two Gaussian vectors on `device`, one of
    4,096 coordinates and one of d coordinates (at most 2^25).

    The pace has the seconds to encode, decode and add as linear functions of the number of coordinates. Each function
    is fitted to the times for the two vectors, which are minima over at least `repeats` calls. The calls use as many
    threads as torch is set to. They are repeated until the three shortest times of each function are within a tenth of
    each other, or until all calls have taken 5 seconds in total. Raises ValueError if the compressor does not support d
    coordinates.
    """
    compressor.validate(d)
    lengths = (min(d, _SHORT), min(d, LONGEST))
    works: dict[str, Callable[[], object]] = {}
    for n in lengths:
        for name, work in _works(compressor.restrict(0, n, d), n, device).items():
            works[f"{name} {n}"] = work
    times = side_by_side(works, repeats=repeats, within=0.1, limit=5.0)
    lines = {
        name: Line.through(*((n, times[f"{name} {n}"].low) for n in lengths)) for name in ("encode", "decode", "add")
    }
    return Pace(**lines)


def _works(compressor: Compressor, n: int, device: torch.device | str) -> Mapping[str, Callable[[], object]]:
    v = torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)
    out, message = torch.zeros_like(v), compressor.encode(v, seed=0, step=0)

    def decode(out: Tensor = out) -> None:
        # Time `receive` too, since a receiver must compute the message's context (data that is not sent), which the
        # sender already has.
        compressor.add_decoded(compressor.receive(message.parts, n, seed=0, step=0), out, 1e-6)

    return {
        "encode": lambda: compressor.encode(v, seed=0, step=0),
        "decode": decode,
        "add": lambda: compressor.add_decoded(message, out, 1e-6),
    }


@dataclass(frozen=True)
class CompressorEntry:
    """A row of the table in which compressors are compared: the contraction, the bytes and the speed of one compressor
    for a vector of d coordinates. The fields `kept` and `milliseconds` are measured on a Gaussian vector."""

    compressor: str
    mu: float  # contraction guaranteed for every vector
    kept: float  # fraction of the measured vector's squared norm that one compression keeps
    linear: bool
    protocol: str
    sent: int  # bytes that one worker sends per step
    received: int  # bytes that one worker receives per step
    milliseconds: float  # time to encode and decode one vector on one thread, median of five


def tabulate(compressor: Compressor, d: int, workers: int) -> CompressorEntry:
    """Return the row of one compressor in the table in which compressors are compared, for a vector of d coordinates
    and a number of `workers`. Sets torch's number of threads to 1. Raises ValueError if the compressor does not support
    d coordinates."""
    compressor.validate(d)
    torch.set_num_threads(1)  # as for a worker that shares its machine with other workers
    v = torch.randn(d, generator=torch.Generator().manual_seed(0))
    times = []
    for step in range(5):
        begin = time.perf_counter()
        decoded = compressor(v, step=step)
        times.append(time.perf_counter() - begin)

    # Compute the bytes of the direct exchange, which averages messages exactly, for a worker that is not rank 0.
    choice = choose(compressor, "direct", d=d, dense=0, workers=workers)
    wire = choice.aggregator.wire(d, 0, min(1, workers - 1), workers, 4)
    return CompressorEntry(
        compressor=describe(compressor),
        mu=compressor.mu(d),
        kept=1 - float((v - decoded).square().sum() / v.square().sum()),
        linear=compressor.linear,
        protocol=choice.name,
        sent=wire.sent,
        received=wire.received,
        milliseconds=1000 * median(times),
    )
