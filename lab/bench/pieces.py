"""Benchmarks of the parts of a step on this machine: the optimizer's work, packing and unpacking, and one exchange.

Each is compared with a baseline (torch.optim.SGD, one copy of the vector, a dense all-reduce) and with the minimum of
memory traffic or bytes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lab.bench.result import Question, Result, machine
from packsaddle import CompressedSGD, Compression
from packsaddle.cli import Group as Commands
from packsaddle.cli import serve
from packsaddle.comm import Communicator, Group, Ledger, choose, launch, process_group, resolve, ring_all_reduce
from packsaddle.compressors import Compressor, RandomK, SketchTopK, TopK, compressors, describe
from packsaddle.compressors.selection import largest
from packsaddle.plan import Timing, side_by_side


def copy_bandwidth(numel: int) -> float:
    """Measure the bandwidth in bytes a second by copying float32[numel]; each element is read and written."""
    source, target = torch.ones(numel), torch.ones(numel)
    return 8 * numel / side_by_side({"copy": lambda: target.copy_(source)}, repeats=7)["copy"].median


def _check_repeats(repeats: int) -> None:
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")


def time_compressors(d: int, ratio: float, repeats: int) -> list[Result]:
    """Time packing and unpacking of a Gaussian vector float32[d] by every compressor. Raises ValueError."""
    if d < 1:
        raise ValueError(f"d must be at least 1, got {d}")
    _check_repeats(repeats)
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
        Result("What do packing and unpacking cost, next to one copy of the vector?", setting, rows),
        Result("What do their parts cost, next to the usual way?", setting, _parts(v, repeats)),
    ]


def _parts(v: torch.Tensor, repeats: int) -> list[dict[str, Any]]:
    """Time random draws and the selection of coordinates, compared with torch's own functions for the same task."""
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


_DENSE = "dense all-reduce"
_HALF = "float16 all-reduce"
_LARGE = 25_000_000  # elements of the float32 vector that measures the link's rate


@dataclass(frozen=True)
class ExchangeTime:
    """The cost of one method of averaging a vector.

    It has a time, and worker 0's number of bytes: those sent or those received, whichever are more.
    """

    name: str
    time: Timing
    moved: float


def time_exchanges(d: int, workers: int, ratio: float, repeats: int) -> list[Result]:
    """Time every compressor's exchange of d coordinates between worker processes.

    Raises ValueError for invalid arguments, and WorkerFailedError if a worker fails.
    """
    if not 2 <= workers <= 64:
        raise ValueError(f"workers must be 2 to 64, got {workers}")
    _check_repeats(repeats)
    if d < 1000:
        raise ValueError(f"d must be at least 1,000 coordinates, got {d}")
    for compressor in compressors(ratio):
        compressor.validate(d)
    rate, costs = launch(exchange_in_process_group, (d, ratio, repeats), workers)
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
    return [
        Result("What does one exchange cost, next to a dense all-reduce and to its own bytes?", setting, rows, notes)
    ]


def exchange_in_process_group(d: int, ratio: float, repeats: int) -> tuple[float, list[ExchangeTime]]:
    """Join the launcher's process group and time all exchanges.

    Returns the rate of a large all-reduce in bytes per second, and the cost of each exchange.
    """
    with process_group() as group:
        torch.set_num_threads(1)
        large = torch.zeros(_LARGE)
        times = side_by_side({"large": lambda: group.all_reduce(large)}, repeats=repeats)
        rate = ring_all_reduce(4 * _LARGE, group.size).sent / times["large"].median
        return rate, _costs(d, ratio, repeats, group)


def _costs(d: int, ratio: float, repeats: int, group: Group) -> list[ExchangeTime]:
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
    return [ExchangeTime(name, times[name], moved[name]) for name in works]


def _halved(v: Tensor, out: Tensor, group: Group) -> Callable[[], object]:
    def work() -> None:
        half = v.to(torch.float16)
        group.all_reduce(half)
        out.copy_(half)

    return work


def _exchanger(compressor: Compressor, v: Tensor, out: Tensor, ledger: Ledger) -> Callable[[], object]:
    channel = Communicator(resolve(None), ledger)
    protocol = choose(compressor, "direct", d=len(v), dense=0, workers=channel.group.size).aggregator
    nothing = v[:0]

    def work() -> None:
        averaged = protocol.average(channel, v, nothing, seed=0, step=channel.step)
        for term in averaged.mean:
            term.add_to(out, 1e-6)
        channel.step += 1

    return work


_LR = 1e-6


@dataclass(frozen=True)
class TimedOptimizer:
    """An optimizer, and the minimum memory traffic of its step in bytes per coordinate."""

    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    moved: float


def _ours(
    compressor: Compressor | Compression, noise: float = 0.0
) -> Callable[[list[nn.Parameter]], torch.optim.Optimizer]:
    return partial(CompressedSGD, lr=_LR, compressor=compressor, noise=noise)


# Minimum memory traffic of a step in bytes per coordinate; each float that is read or written counts 4 bytes. SGD reads
# x and the gradient, and writes x. Adding the gradient to an error memory also takes two reads and a write. For each
# sent coordinate, the memory and x are read and written, and the message is written and read.
_CONTENDERS: Mapping[str, TimedOptimizer] = {
    "torch.optim.SGD": TimedOptimizer(partial(torch.optim.SGD, lr=_LR), 12),
    "RandomK 1%": TimedOptimizer(_ours(RandomK(0.01)), 12 + 0.01 * 24),
    "RandomK 1%, max_skipped=None": TimedOptimizer(_ours(Compression(RandomK(0.01), max_skipped=None)), 12 + 0.01 * 24),
    "RandomK 1%, noise": TimedOptimizer(_ours(RandomK(0.01), noise=0.01), 12 + 0.01 * 32),
    "TopK 0.1%": TimedOptimizer(_ours(TopK(0.001)), 16 + 0.001 * 24),
    "TopK 0.1%, noise": TimedOptimizer(_ours(TopK(0.001), noise=0.01), 24 + 0.001 * 24),
}


def time_steps(d: int, repeats: int, layers: int = 1) -> list[Result]:
    """Time step() and zero_grad() of each optimizer, on d coordinates divided among `layers` parameters.

    Raises ValueError for invalid sizes.
    """
    if d < 1000:
        raise ValueError(f"d must be at least 1,000 coordinates, got {d}")
    _check_repeats(repeats)
    if not 1 <= layers <= d // 1000:
        raise ValueError(f"layers must be between 1 and {d // 1000}, a thousand coordinates each, got {layers}")
    torch.set_num_threads(1)
    steppers = {name: Stepper(contender, d, layers) for name, contender in _CONTENDERS.items()}
    bandwidth = copy_bandwidth(d)
    times = side_by_side(steppers, repeats=repeats, warm_up=2)
    sgd = times["torch.optim.SGD"].median
    rows = [
        {
            "optimizer": name,
            "ms": 1000 * t.median,
            "low": 1000 * t.low,
            "high": 1000 * t.high,
            "/ SGD": t.median / sgd,
            "/ copy": t.median * bandwidth / (8 * d),
            "/ floor": t.median * bandwidth / (_CONTENDERS[name].moved * d),
            "memory / d": steppers[name].held() / (4 * d),
        }
        for name, t in times.items()
    ]
    setting = {"d": d, "parameters": layers, "copy GB/s": bandwidth / 1e9, **machine()}
    notes = (
        "floor: the bytes that must be moved, at the bandwidth of a copy; memory: held over the model and its gradient",
        "max_skipped=None: gradients are not looked at, and no step can be left out",
    )
    return [Result("step() and zero_grad(): what does an optimizer's own work cost?", setting, rows, notes)]


class Stepper:
    """An optimizer with its parameters; a call steps and clears the gradients."""

    def __init__(self, contender: TimedOptimizer, d: int, layers: int) -> None:
        sizes = [d // layers // 1000 * 1000] * layers
        self._weights = [nn.Parameter(torch.zeros(size // 1000, 1000)) for size in sizes]
        rng = torch.Generator().manual_seed(0)
        self._gradients = [torch.randn(w.shape, generator=rng) for w in self._weights]
        for w, gradient in zip(self._weights, self._gradients, strict=True):
            w.grad = gradient
        self._optimizer = contender.make(self._weights)

    def __call__(self) -> None:
        for w, gradient in zip(self._weights, self._gradients, strict=True):
            w.grad = gradient
        self._optimizer.step()
        self._optimizer.zero_grad()

    def held(self) -> int:
        """Bytes of the optimizer's state that are neither parameters nor gradients."""
        counted = {t.untyped_storage().data_ptr() for w in self._weights for t in (w, w.grad) if t is not None}
        held = 0
        for state in self._optimizer.state.values():
            for tensor in state.values():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in counted:
                    counted.add(storage.data_ptr())
                    held += storage.nbytes()
        if isinstance(self._optimizer, CompressedSGD):
            held += self._optimizer.spare_bytes
        return held


@dataclass(frozen=True)
class Step(Question):
    """Time an optimizer step, compared with torch.optim.SGD's and with its minimum memory traffic.

    Examples:
        python -m lab.bench.pieces step
        python -m lab.bench.pieces step --d 1000000 --layers 50
    """

    # Coordinates
    d: int = 25_000_000
    # Parameters that the coordinates are spread over
    layers: int = 1
    # Timed rounds
    repeats: int = 7

    def run(self) -> list[Result]:
        return time_steps(self.d, self.repeats, self.layers)


@dataclass(frozen=True)
class Compress(Question):
    """Time packing and unpacking by each compressor, compared with one copy of the vector.

    Examples:
        python -m lab.bench.pieces compress --ratio 0.001
        python -m lab.bench.pieces compress --d 1000000 --json
    """

    # Coordinates
    d: int = 25_000_000
    # k/d of the compressors that have one
    ratio: float = 0.01
    # Timed rounds
    repeats: int = 5

    def run(self) -> list[Result]:
        return time_compressors(self.d, self.ratio, self.repeats)


@dataclass(frozen=True)
class Exchange(Question):
    """Time one exchange, compared with a dense all-reduce and with its bytes over this machine's rate.

    Examples:
        python -m lab.bench.pieces exchange --workers 4
    """

    # Coordinates
    d: int = 10_000_000
    # Worker processes on this machine
    workers: int = 2
    # k/d of the compressors that have one
    ratio: float = 0.01
    # Timed rounds
    repeats: int = 5

    def run(self) -> list[Result]:
        return time_exchanges(self.d, self.workers, self.ratio, self.repeats)


PROGRAM = "python -m lab.bench.pieces"
COMMANDS = Commands(
    "Time the pieces of a training step, next to the usual way and to the memory traffic or bytes that they need.",
    {"step": Step, "compress": Compress, "exchange": Exchange},
)


def main() -> None:
    """Run the benchmark that the command line names."""
    serve(COMMANDS, PROGRAM)


if __name__ == "__main__":
    main()
