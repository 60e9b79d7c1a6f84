"""Reading the states of this worker's modules on purpose, which between rounds are not those of the other workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OWN_STATE: ContextVar[bool] = ContextVar("own_state", default=False)


@contextmanager
def own_state() -> Iterator[None]:
    """Context manager, also a decorator, of code that saves or restores each worker's own states."""
    token = _OWN_STATE.set(True)
    try:
        yield
    finally:
        _OWN_STATE.reset(token)


def is_own_state() -> bool:
    return _OWN_STATE.get()
