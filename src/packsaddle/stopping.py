"""SIGTERM as a wish to stop at the next opportunity, with everything saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


def asked_to_stop() -> bool:
    """Whether this process has been sent SIGTERM in `hearing_sigterm`."""
    return _asked.is_set()


@contextmanager
def hearing_sigterm() -> Iterator[None]:
    """Take note of a SIGTERM within; a second one ends the process, as ever. For the main thread."""
    _asked.clear()
    before = signal.getsignal(signal.SIGTERM)

    def take_note(number: int, frame: FrameType | None) -> None:
        _asked.set()
        signal.signal(signal.SIGTERM, before)

    signal.signal(signal.SIGTERM, take_note)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
