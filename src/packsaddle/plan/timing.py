"""Timing of several functions in interleaved rounds, so that other load on the machine affects all of them equally."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one function over several repeats."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(median(seconds), min(seconds), max(seconds))


def side_by_side(
    works: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warm_up: int = 1,
    prepare: Callable[[], object] = int,
) -> dict[str, Timing]:
    """Time every function in `works` `repeats` times, in rounds: the first, the second, ..., the first again.

    `prepare` runs before each call and is not timed.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    for attempt in range(warm_up + repeats):
        for name, work in works.items():
            prepare()
            seconds = clocked(work)
            if attempt >= warm_up:
                taken[name].append(seconds)
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def clocked(work: Callable[[], object]) -> float:
    """Return the seconds of one call, with the GPU work that it launches."""
    _synchronise()
    begin = time.perf_counter()
    work()
    _synchronise()
    return time.perf_counter() - begin


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def copy_bandwidth(numel: int, *, repeats: int = 7, device: torch.device | str = "cpu") -> float:
    """Return the bytes a second moved by copying float32[numel]: each element is read once and written once."""
    source, target = (torch.ones(numel, device=device) for _ in range(2))
    return 8 * numel / side_by_side({"copy": lambda: target.copy_(source)}, repeats=repeats)["copy"].median
