"""A mark for code that intentionally reads or restores the module states of this worker alone. Between two exchanges
of local updates the states differ between workers."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OWN_STATE: ContextVar[bool] = ContextVar("own_state", default=False)


@contextmanager
def own_state() -> Iterator[None]:
    """A context manager and decorator that marks code that saves or restores each worker's own states."""
    token = _OWN_STATE.set(True)
    try:
        yield
    finally:
        _OWN_STATE.reset(token)


def is_own_state() -> bool:
    return _OWN_STATE.get()
