"""SIGTERM to a worker among others that come and go: it leaves at its next inner step, or where it waits for others."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_MOMENT = 3.0  # seconds that the interpreter has for its end
_LONGEST = 1e9  # seconds, of a timer


class LeavingError(Exception):
    """SIGTERM came, and this worker need not or cannot wait for others any longer."""


class Sigterm:
    """The record of a SIGTERM: `asked` is True afterwards.

    A wait for others ends at once if `may_leave()` returns True then, and otherwise `grace` seconds after the signal.
    """

    def __init__(self, may_leave: Callable[[], bool], grace: float) -> None:
        self.asked = False
        self._may_leave, self._grace = may_leave, grace
        self._waiting, self._until = False, 0.0

    def listen(self) -> None:
        """Handle the signal from now on; no-op outside the main thread, where Python permits no handler."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)

    @property
    def left(self) -> float:
        """The seconds of grace that are left, all of them before the signal."""
        return max(0.0, self._until - time.monotonic()) if self.asked else self._grace

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, others are waited for, and LeavingError is raised when that must end; also by an earlier signal."""
        self._waiting = True
        try:
            if self.asked:
                self._interrupt()
            yield
        finally:
            self._waiting = False

    def hold(self) -> None:
        """End the wait early: the rest of the block must not be interrupted."""
        self._waiting = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Record the signal, and interrupt a wait, now or when the grace is over. A second signal kills."""
        if self.asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked, self._until = True, time.monotonic() + self._grace
        if self._waiting:
            self._interrupt()
        signal.signal(signal.SIGALRM, self._late)
        signal.setitimer(signal.ITIMER_REAL, min(max(self.left, 1e-3), _LONGEST))

    def _late(self, number: int, frame: FrameType | None) -> None:
        """End a wait, now that the grace is over."""
        self._until = 0.0
        if self._waiting:
            self._interrupt()

    def _interrupt(self) -> None:
        if self._may_leave() or not self.left:
            self._waiting = False
            raise LeavingError


def end_process(code: int) -> NoReturn:
    """End the process by SystemExit, and soon: the interpreter would wait for torchft's thread, and that for others."""
    end = threading.Timer(_MOMENT, os._exit, (code,))
    end.daemon = True
    end.start()
    sys.exit(code)
