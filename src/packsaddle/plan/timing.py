"""Timing of several functions by alternating calls, so that other work of the machine affects all of them equally."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from statistics import median

from packsaddle.numerics.devices import synchronize


@dataclass(frozen=True)
class Timing:
    """Median, lowest and highest duration, in seconds, of `repeats` calls of one function."""

    median: float
    low: float
    high: float
    repeats: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        return cls(median(seconds), min(seconds), max(seconds), len(seconds))


def side_by_side(
    works: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warm_up: int = 1,
    prepare: Callable[[], object] = int,
    within: float = math.inf,
    limit: float = 20.0,
) -> dict[str, Timing]:
    """Time at least `repeats` calls of each function in `works`. The functions are called alternately: the first, the
    second, ..., the last, and then the first again.

    `prepare` runs before each call and is not timed. The first `warm_up` calls of each function do not count. If
    `within` is finite, further calls are made until the three shortest times of each function differ by at most this
    fraction, or until the timed calls have taken `limit` seconds in total. Returns the times of each function by its
    name in `works`.
    """
    taken: dict[str, list[float]] = {name: [] for name in works}
    fastest: dict[str, list[float]] = {name: [] for name in works}  # the three shortest times of each function
    spent = 0.0
    for attempt in count():
        is_settled = all(_is_reproduced(each, within) for each in fastest.values()) or spent >= limit
        if attempt >= warm_up + repeats and is_settled:
            break
        for name, work in works.items():
            prepare()
            seconds = clocked(work)
            if attempt >= warm_up:
                taken[name].append(seconds)
                fastest[name] = sorted([*fastest[name], seconds])[:3]
                spent += seconds
    return {name: Timing.of(seconds) for name, seconds in taken.items()}


def repeated(work: Callable[[], object], *, least: int = 5, limit: float = 20.0) -> Timing:
    """Time `work` at least `least` times after two warm-up calls. Calls are repeated until the three shortest times are
    within 2% of each other, or until the timed calls have taken `limit` seconds in total.

    Other programs on the machine can only lengthen a call, so the minimum is reproducible.
    """
    for _ in range(2):
        work()
    return side_by_side({"work": work}, repeats=least, warm_up=0, within=0.02, limit=limit)["work"]


def _is_reproduced(fastest: list[float], within: float) -> bool:
    return not fastest or math.isinf(within) or fastest[-1] <= (1 + within) * fastest[0]


def clocked(work: Callable[[], object]) -> float:
    """Return the seconds of one call of `work`, including the GPU work that it launches."""
    synchronize()
    begin = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - begin
