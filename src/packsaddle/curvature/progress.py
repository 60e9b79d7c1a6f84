"""What a certificate is doing: progress for whoever waits, a limit on the time, and Ctrl-C.

The work of a certificate is a few phases, each of which reads its examples a number of times. A phase's time left is
extrapolated from the reads that are done.
"""

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

_UNBOUNDED = (-math.inf, math.inf)
_SILENT, _BETWEEN = 1.5, 10.0  # seconds until the first printed line, and between two lines


class Stopped(BaseException):
    """Raised in place of KeyboardInterrupt, to end a certificate with what is known so far."""


@dataclass(frozen=True)
class Progress:
    """What a certificate has done so far. `certify` passes it to the function given as `progress`."""

    phase: str  # what is being done, such as "search on 2,048 of 60,000 examples"
    done: float  # number of times that the phase has read its examples; a fraction within a read
    expected: float | None  # number of times that it will read them at most; None: unknown
    products: int  # number of Hessian-vector products of the phase
    lambda_min: tuple[float, float]  # bounds on the smallest eigenvalue, for the phase's examples
    lambda_max: tuple[float, float]  # bounds on the largest eigenvalue, for the phase's examples
    threshold: float | None  # threshold for lambda_min, below which x is a saddle; None: no epsilon, or rho unknown
    seconds: float  # since the certificate was begun
    left: float | None  # seconds left in the phase, if it reads its examples as often as expected; None: unknown

    def __str__(self) -> str:
        text = self.phase
        if self.products:
            low, high = self.lambda_min
            asked = "" if self.threshold is None else f", threshold {self.threshold:.1e}"
            text += f", product {self.products}: lambda_min in [{low:.1e}, {high:.1e}]{asked}"
        return text if self.left is None else f"{text}, at most {self.left:.0f} s left"


class Reporter:
    """Collects what the parts of a certificate report, and shows it.

    `show` is called with every change, on rank 0 alone. `is_alone` is True if no other process takes part, so that the
    certificate may be stopped at any batch.
    """

    def __init__(self, show: Callable[[Progress], None], *, is_alone: bool) -> None:
        self._show, self._is_alone = show, is_alone
        self._begin = self._since = time.perf_counter()
        self.interrupted = False
        self.phase("loss and gradient", 3)

    def phase(self, name: str, reads: float | None) -> None:
        """Begin a phase that will read its examples at most this many times; None: unknown."""
        self._name, self._expected, self._done, self._products = name, reads, 0.0, 0
        self._bounds: tuple[Any, Any, float | None] = (_UNBOUNDED, _UNBOUNDED, None)
        self._since = time.perf_counter()
        self._tell()

    def read(self, part: float) -> None:
        """Record that a part of this worker's batches was read. Raises Stopped after Ctrl-C, if this process is
        alone."""
        self._done += part
        self._tell()
        if self.interrupted and self._is_alone:
            raise Stopped

    def bounds(self, lambda_min: tuple[float, float], lambda_max: tuple[float, float], threshold: float | None) -> None:
        """Record the bounds after one more Hessian-vector product."""
        self._products += 1
        self._bounds = lambda_min, lambda_max, threshold
        self._tell()

    @property
    def in_phase(self) -> float:
        """Seconds since the phase began."""
        return time.perf_counter() - self._since

    @property
    def seconds(self) -> float:
        """Seconds since the certificate was begun."""
        return time.perf_counter() - self._begin

    def _tell(self) -> None:
        left = None
        if self._expected and self._done:
            left = self.in_phase * max(0.0, self._expected / self._done - 1)
        self._show(Progress(self._name, self._done, self._expected, self._products, *self._bounds, self.seconds, left))

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """Context manager in which the first Ctrl-C sets `interrupted`; a second one raises KeyboardInterrupt. It
        changes nothing outside of the main thread, or if the script handles SIGINT itself."""
        default = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or default is not signal.default_int_handler:
            yield
            return

        def stop(number: int, frame: Any) -> None:
            self.interrupted = True
            signal.signal(signal.SIGINT, default)

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        except Stopped:  # before anything was known
            raise KeyboardInterrupt from None
        finally:
            signal.signal(signal.SIGINT, default)


@contextmanager
def shown(progress: bool | Callable[[Progress], None], *, is_first: bool) -> Iterator[Callable[[Progress], None]]:
    """Context manager that yields the function which shows progress.

    `progress` may be that function. If it is True, progress is a bar on a terminal and in a notebook, and lines on
    stderr elsewhere, the first after a second and a half. It is shown on rank 0 alone (`is_first`).
    """
    if not is_first or progress is False:
        yield lambda progress: None
    elif callable(progress):
        yield progress
    elif (console := Console(stderr=True)).is_terminal or console.is_jupyter:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("at most"), TimeRemainingColumn()
        with Bar(*columns, console=console, transient=True) as bar:
            task = bar.add_task("certify", total=None)

            def draw(now: Progress) -> None:
                name = str(now).removesuffix("" if now.left is None else f", at most {now.left:.0f} s left")
                bar.update(task, description=f"certify: {name}", completed=now.done, total=now.expected)

            yield draw
    else:
        last = -math.inf

        def line(now: Progress) -> None:
            nonlocal last
            if now.seconds >= max(_SILENT, last + _BETWEEN):
                last = now.seconds
                print(f"certify: {now}", file=sys.stderr, flush=True)

        yield line
