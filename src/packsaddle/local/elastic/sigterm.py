"""SIGTERM handling: on the signal, a worker leaves the run after its next inner step, or while it waits for other
workers."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_MOMENT = 3.0  # seconds after which a process that has not ended yet is ended forcibly
_LONGEST = 1e9  # maximum duration of a timer, in seconds


class LeavingError(BaseException):
    """Raised within a wait for other workers after SIGTERM, if this worker may leave the run immediately or the grace
    period is over. It is not a subclass of Exception, so that error handlers in the wait do not catch it."""


class Sigterm:
    """Handles SIGTERM. The signal interrupts a wait for other workers: immediately if `may_leave()` returns True, and
    otherwise `grace` seconds after the signal. Outside a wait it only sets `asked` to True, and the worker leaves after
    its next inner step."""

    def __init__(self, may_leave: Callable[[], bool], grace: float) -> None:
        self.asked = False
        self._may_leave, self._grace = may_leave, grace
        self._waiting, self._until = False, 0.0

    def listen(self) -> None:
        """Install the signal handler. No-op outside the main thread, where Python does not allow it."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)

    @property
    def left(self) -> float:
        """The remaining seconds of the grace period. Before the signal, the whole grace period remains."""
        return max(0.0, self._until - time.monotonic()) if self.asked else self._grace

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Context manager for a wait for other workers, within which SIGTERM raises LeavingError: immediately if the
        worker may leave, and otherwise at the end of the grace period. This is also so if the signal was received
        before the wait."""
        self._waiting = True
        try:
            if self.asked:
                self._interrupt_wait()
            yield
        finally:
            self._waiting = False

    def hold(self) -> None:
        """Within `waiting`, prevent SIGTERM from interrupting the rest of the context's block."""
        self._waiting = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM: interrupt a wait for other workers, now if the worker may leave, and otherwise after the
        grace period. A second SIGTERM ends the process as if there were no handler."""
        if self.asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked, self._until = True, time.monotonic() + self._grace
        self._interrupt_wait()
        signal.signal(signal.SIGALRM, self._late)
        signal.setitimer(signal.ITIMER_REAL, min(max(self.left, 1e-3), _LONGEST))

    def _late(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGALRM, which a timer sends at the end of the grace period: interrupt a wait for other workers."""
        self._until = 0.0
        self._interrupt_wait()

    def _interrupt_wait(self) -> None:
        if self._waiting and (self._may_leave() or not self.left):
            self._waiting = False
            raise LeavingError


def end_process(code: int) -> NoReturn:
    """Raise SystemExit with the exit code `code`. If the process has not ended after 3 s, it is ended forcibly, since
    the exit of the interpreter may wait for torchft's thread."""
    end = threading.Timer(_MOMENT, os._exit, (code,))
    end.daemon = True
    end.start()
    sys.exit(code)
