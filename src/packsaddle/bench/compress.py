"""What do packing and unpacking cost, beside copying the vector once?"""

from collections.abc import Callable

import torch

from packsaddle.bench.result import Result, machine
from packsaddle.bench.timing import copy_bandwidth, side_by_side
from packsaddle.catalogue import compressors, describe
from packsaddle.compress import Compressor


def run(d: int, ratio: float, repeats: int) -> list[Result]:
    """Time every compressor on a Gaussian vector. Raises ValueError for a bad ratio or d."""
    torch.set_num_threads(1)
    v = torch.randn(d, generator=torch.Generator().manual_seed(0))
    out = torch.zeros(d)
    bandwidth = copy_bandwidth(d)
    works: dict[str, Callable[[], object]] = {}
    for compressor in compressors(ratio):
        compressor.validate(d)
        name = describe(compressor)
        works[f"{name} pack"] = _packer(compressor, v)
        works[f"{name} unpack"] = _unpacker(compressor, v, out)
    times = side_by_side(works, repeats=repeats)
    copy = 8 * d / bandwidth
    rows = []
    for compressor in compressors(ratio):
        name = describe(compressor)
        pack, unpack = times[f"{name} pack"].median, times[f"{name} unpack"].median
        milliseconds = {"pack ms": 1000 * pack, "unpack ms": 1000 * unpack}
        rows.append({"compressor": name, **milliseconds, "/ copy": (pack + unpack) / copy})
    setting = {"d": d, "copy GB/s": bandwidth / 1e9, "copy ms": 1000 * copy, **machine()}
    return [Result("What do packing and unpacking cost, beside copying the vector once?", setting, rows)]


def _packer(compressor: Compressor, v: torch.Tensor) -> Callable[[], object]:
    return lambda: compressor.encode(v, seed=0, step=0)


def _unpacker(compressor: Compressor, v: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    message = compressor.encode(v, seed=0, step=0)
    received = compressor.receive(message.parts, len(v), seed=0, step=0)
    return lambda: compressor.add_decoded(received, out, 1e-6)
