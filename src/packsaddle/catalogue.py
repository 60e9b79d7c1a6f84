"""Every compressor side by side: contraction, protocol, bytes and time on this machine."""

import time
from dataclasses import dataclass, fields, is_dataclass
from statistics import median

import torch

from packsaddle.choose import choose
from packsaddle.compress import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    Identity,
    LinearSketch,
    LowRank,
    RandomK,
    Sign,
    SketchTopK,
    TopK,
)

_REPEATS = 5
_SHARE = 0.5


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


def compressors(ratio: float) -> list[Compressor]:
    """Return every compressor, those that have a ratio at this one. Raises ValueError for a ratio outside (0, 1]."""
    return [
        Identity(),
        RandomK(ratio),
        RandomK(ratio, block_size=1),
        RandomK(ratio, values="bfloat16"),
        TopK(ratio),
        TopK(ratio, values="int8"),
        AdaptiveTopK(_SHARE),
        SketchTopK(ratio),
        LinearSketch(ratio),
        Sign(),
        QSGD(),
        LowRank(),
    ]


def describe(compressor: Compressor) -> str:
    """The compressor with those of its fields that are not at their defaults."""
    assert is_dataclass(compressor)
    changed = [f for f in fields(compressor) if getattr(compressor, f.name) != f.default]
    return f"{type(compressor).__name__}({', '.join(f'{f.name}={getattr(compressor, f.name)!r}' for f in changed)})"


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
