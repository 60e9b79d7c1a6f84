"""What do packing and unpacking cost, beside copying the vector once?"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from packsaddle.compressors import Compressor, RandomK, SketchTopK
from packsaddle.compressors.registry import compressors, describe
from packsaddle.compressors.selection import largest
from packsaddle.performance.bench.result import Result, machine
from packsaddle.performance.timing import copy_bandwidth, side_by_side


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
    return [
        Result("What do packing and unpacking cost, beside copying the vector once?", setting, rows),
        Result("What do their parts cost, beside how it is usually done?", setting, _parts(v, repeats)),
    ]


def _parts(v: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time what drawing and choosing coordinates takes, and torch's way of it."""
    d, rng = len(v), torch.Generator().manual_seed(0)
    few, many, hashes = max(1, d // 1000), max(1, d // 100), SketchTopK(0.01, rows=5).hashes(d, seed=0, step=0)
    target = torch.empty_like(v)
    kept = {f"RandomK(k={many})": RandomK(k=many), f"RandomK(k={many}, block_size=1)": RandomK(k=many, block_size=1)}
    works: dict[str, tuple[str, Callable[[], object], str, Callable[[], object]]] = {}
    for name, compressor in kept.items():
        works[name] = (
            f"draw the cells of {name}",
            partial(compressor.cells, d, seed=0, step=0),
            f"torch.randperm(d)[:{many}]",
            lambda: torch.randperm(d, generator=rng)[:many],
        )
    works["largest"] = (
        f"the {few:,} largest magnitudes",
        lambda: largest(v, few),
        "torch.topk(v.abs())",
        lambda: torch.topk(v.abs(), few),
    )
    works["sketch"] = (
        "sketch 5 rows of SketchTopK(0.01)",
        lambda: [row.sketch(v) for row in hashes],
        "copy the vector",
        lambda: target.copy_(v),
    )
    timed: dict[str, Callable[[], object]] = {}
    for name, (_, ours, _, usual) in works.items():
        timed |= {f"{name} ours": ours, f"{name} usual": usual}
    times = side_by_side(timed, repeats=repeats)
    rows = []
    for name, (part, _, how, _) in works.items():
        mine, theirs = times[f"{name} ours"].median, times[f"{name} usual"].median
        row = {"part": part, "ms": 1000 * mine, "usually": how, "usual ms": 1000 * theirs, "ratio": mine / theirs}
        rows.append(row)
    return rows


def _packer(compressor: Compressor, v: torch.Tensor) -> Callable[[], object]:
    return lambda: compressor.encode(v, seed=0, step=0)


def _unpacker(compressor: Compressor, v: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    message = compressor.encode(v, seed=0, step=0)
    received = compressor.receive(message.parts, len(v), seed=0, step=0)
    return lambda: compressor.add_decoded(received, out, 1e-6)
