"""SIGTERM to a worker among others that come and go: it leaves at its next inner step, or where it waits for others."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

_MOMENT = 3.0  # seconds that the interpreter has for its end


class LeavingError(Exception):
    """SIGTERM came while this worker waited for others."""


class Sigterm:
    """Takes note of SIGTERM: `asked` is True afterwards. `interrupts` has it end a wait for others at once."""

    def __init__(self, *, interrupts: bool) -> None:
        self.asked = False
        self._waiting, self._interrupts = False, interrupts

    def listen(self) -> None:
        """Handle the signal from now on; nothing outside the main thread, where Python permits no handler."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._hear)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, others are waited for, and the signal raises LeavingError if it interrupts; also an earlier one."""
        self._waiting = True
        try:
            if self.asked and self._interrupts:
                raise LeavingError
            yield
        finally:
            self._waiting = False

    def hold(self) -> None:
        """End the wait early: what follows within it must not be interrupted."""
        self._waiting = False

    def _hear(self, number: int, frame: FrameType | None) -> None:
        """Take note, and interrupt a wait. A second signal kills."""
        if self.asked:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.asked = True
        if self._waiting and self._interrupts:
            self._waiting = False
            raise LeavingError


def end_process() -> NoReturn:
    """End the process by SystemExit, and soon: the interpreter would wait for torchft's thread, and that for others."""
    end = threading.Timer(_MOMENT, os._exit, (0,))
    end.daemon = True
    end.start()
    sys.exit(0)
