"""What does one exchange cost, beside a dense all-reduce, and beside its bytes at the rate that this machine moves?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.comm.communicator import Channel, ring_all_reduce
from packsaddle.comm.group import Group, resolve
from packsaddle.comm.launch import launch, process_group
from packsaddle.comm.ledger import Ledger
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import compressors, describe
from packsaddle.performance.bench.result import Result, machine
from packsaddle.performance.timing import Timing, side_by_side

_DENSE = "dense all-reduce"
_HALF = "float16 all-reduce"
_LARGE = 25_000_000  # float32, for the rate


@dataclass(frozen=True)
class Cost:
    """One way to average a vector: seconds, and bytes of the fuller direction of worker 0."""

    name: str
    time: Timing
    moved: float


def run(d: int, workers: int, ratio: float, repeats: int) -> list[Result]:
    """Time every compressor's exchange of d coordinates. Raises ValueError for bad arguments, WorkerFailedError."""
    if not 2 <= workers <= 64:
        raise ValueError(f"workers must be 2 to 64, got {workers}")
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    if d < 1000:
        raise ValueError(f"d must be at least 1,000 coordinates, got {d}")
    for compressor in compressors(ratio):
        compressor.validate(d)
    rate, costs = launch(in_process_group, (d, ratio, repeats), workers)
    dense = next(cost for cost in costs if cost.name == _DENSE).time.median
    rows = [
        {
            "exchange": cost.name,
            "ms": 1000 * cost.time.median,
            "low": 1000 * cost.time.low,
            "high": 1000 * cost.time.high,
            "bytes": round(cost.moved),
            "floor ms": 1000 * cost.moved / rate,
            "/ floor": cost.time.median * rate / cost.moved,
            "dense / it": dense / cost.time.median,
        }
        for cost in costs
    ]
    setting = {"d": d, "workers": workers, "loopback GB/s": rate / 1e9, **machine()}
    notes = [
        f"floor: bytes at the rate of a plain all-reduce of {_LARGE:,} float32 on these processes",
        "bytes: by the ledger, in the fuller direction",
        "a compressor's time includes encoding, and applying the mean to a vector",
    ]
    return [Result("What does one exchange cost, beside a dense all-reduce and its own bytes?", setting, rows, notes)]


def in_process_group(d: int, ratio: float, repeats: int) -> tuple[float, list[Cost]]:
    """Join the launcher's world; return the rate of a large all-reduce, bytes a second, and every exchange's cost."""
    with process_group() as group:
        torch.set_num_threads(1)
        large = torch.zeros(_LARGE)
        times = side_by_side({"large": lambda: group.all_reduce(large)}, repeats=repeats)
        rate = ring_all_reduce(4 * _LARGE, group.size).sent / times["large"].median
        return rate, _costs(d, ratio, repeats, group)


def _costs(d: int, ratio: float, repeats: int, group: Group) -> list[Cost]:
    v = torch.randn(d, generator=torch.Generator().manual_seed(group.rank))
    out = torch.zeros(d)
    works: dict[str, Callable[[], object]] = {_DENSE: lambda: group.all_reduce(out), _HALF: _halved(v, out, group)}
    ledgers: dict[str, Ledger] = {}
    for compressor in compressors(ratio):
        name = describe(compressor)
        ledgers[name] = Ledger()
        works[name] = _exchanger(compressor, v, out, ledgers[name])
    times = side_by_side(works, repeats=repeats, prepare=lambda: group.all_reduce(torch.zeros(1)))
    moved = {_DENSE: float(ring_all_reduce(4 * d, group.size).sent), _HALF: ring_all_reduce(2 * d, group.size).sent}
    for name, ledger in ledgers.items():
        total, exchanges = ledger.total, 1 + ledger.spans[-1].last
        moved[name] = max(total.sent, total.received) / exchanges
    return [Cost(name, times[name], moved[name]) for name in works]


def _halved(v: Tensor, out: Tensor, group: Group) -> Callable[[], object]:
    def work() -> None:
        half = v.to(torch.float16)
        group.all_reduce(half)
        out.copy_(half)

    return work


def _exchanger(compressor: Compressor, v: Tensor, out: Tensor, ledger: Ledger) -> Callable[[], object]:
    channel = Channel(resolve(None), ledger)
    protocol = choose(compressor, "direct", d=len(v), dense=0, workers=channel.group.size).protocol
    nothing = v[:0]

    def work() -> None:
        averaged = protocol.average(channel, v, nothing, seed=0, step=channel.step)
        for term in averaged.mean:
            term.add_to(out, 1e-6)
        channel.step += 1

    return work
