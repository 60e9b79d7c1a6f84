"""A context that permits reading a model's `state_dict` while its parameters differ between workers.

With `LocalUpdates` parameters differ between workers until the next exchange, and reading them causes a warning. Code
that saves or restores the state of each worker separately, as checkpoints do, runs within `own_state`, which suppresses
the warning.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_OWN_STATE: ContextVar[bool] = ContextVar("own_state", default=False)


@contextmanager
def own_state() -> Iterator[None]:
    """Context manager and decorator for code that saves or restores the state of each worker separately. Within it,
    reading a model's `state_dict` causes no warning that parameters differ between workers."""
    token = _OWN_STATE.set(True)
    try:
        yield
    finally:
        _OWN_STATE.reset(token)


def is_own_state() -> bool:
    return _OWN_STATE.get()
