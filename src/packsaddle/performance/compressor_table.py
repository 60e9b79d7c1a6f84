"""One compressor measured on a Gaussian vector: contraction, protocol, bytes, and time on this machine."""

import time
from dataclasses import dataclass
from statistics import median

import torch

from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import describe

_REPEATS = 5


@dataclass(frozen=True)
class Entry:
    """One compressor on a Gaussian vector of d coordinates; bytes are one worker's, of one step."""

    compressor: str
    mu: float  # guaranteed for every vector
    kept: float  # share of this vector's energy that one compression keeps
    linear: bool
    protocol: str
    sent: int  # bytes up
    received: int  # bytes down
    milliseconds: float  # to encode and decode one vector on one thread, the median of five


def measure(compressor: Compressor, d: int, workers: int) -> Entry:
    """Try one compressor. Raises ValueError if it cannot act on d coordinates."""
    compressor.validate(d)
    torch.set_num_threads(1)  # as a worker that shares its machine
    v = torch.randn(d, generator=torch.Generator().manual_seed(0))
    times = []
    for step in range(_REPEATS):
        begin = time.perf_counter()
        decoded = compressor(v, step=step)
        times.append(time.perf_counter() - begin)
    choice = choose(compressor, "direct", d=d, dense=0, workers=workers)
    wire = choice.protocol.wire(d, 0, min(1, workers - 1), workers, 4)
    return Entry(
        compressor=describe(compressor),
        mu=compressor.mu(d),
        kept=1 - float((v - decoded).square().sum() / v.square().sum()),
        linear=compressor.linear,
        protocol=choice.name,
        sent=wire.sent,
        received=wire.received,
        milliseconds=1000 * median(times),
    )
