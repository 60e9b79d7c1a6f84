"""Clocks for tests, in place of a module's `time`, so that a test takes the same steps on any machine."""

from collections import Counter
from itertools import count

from packsaddle.comm import resolve


class Clock:
    """One second passes from one reading to the next, and pauses take none."""

    def __init__(self) -> None:
        self._readings = count()

    def monotonic(self) -> float:
        return float(next(self._readings))

    def sleep(self, seconds: float) -> None:
        pass


class WorkersClock:
    """A clock of each worker, which `work` alone advances."""

    def __init__(self) -> None:
        self._now: Counter[int] = Counter()  # by rank

    def monotonic(self) -> float:
        return float(self._now[resolve(None).rank])

    def work(self, seconds: int) -> None:
        self._now[resolve(None).rank] += seconds
