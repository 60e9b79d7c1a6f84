"""Clocks that replace a module's `time` in tests, so that a test does the same on any machine."""

from collections import Counter
from itertools import count

from packsaddle.comm import resolve


class Clock:
    """A clock on which each reading is one second after the last one, and `sleep` takes no time."""

    def __init__(self) -> None:
        self._readings = count()

    def monotonic(self) -> float:
        return float(next(self._readings))

    def sleep(self, seconds: float) -> None:
        pass


class WorkersClock:
    """One clock per simulated worker, which only `work` advances."""

    def __init__(self) -> None:
        self._now: Counter[int] = Counter()  # time by rank

    def monotonic(self) -> float:
        return float(self._now[resolve(None).rank])

    def work(self, seconds: int) -> None:
        self._now[resolve(None).rank] += seconds
