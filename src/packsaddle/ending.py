"""How launched workers end: those that are left after one has failed, and those that were told to."""

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.multiprocessing.spawn import ProcessContext

from packsaddle.stopping import asked_to_stop

SECONDS = 3.0  # before SIGTERM, and then before SIGKILL
_MOMENT = 2.0  # seconds, in which a launcher that still listens has heard a result


@contextmanager
def soon() -> Iterator[None]:
    """Within, others than a worker that has failed have SECONDS to end by themselves, and as long again by SIGTERM.

    torch's launcher joins its workers with the default grace period of torch.multiprocessing: SIGTERM at once and 30 s,
    which a worker that is stopped uses up. No setting of the launcher changes that; LaunchConfig's shutdown_timeout is
    for signals to the launcher, when workers save: 30 s, here as ever.
    """
    context: Any = ProcessContext
    join = context.join

    def sooner(self: Any, timeout: float | None = None, grace_period: float | None = None) -> Any:
        return join(self, timeout, SECONDS if grace_period is None else grace_period)

    context.join = sooner
    try:
        yield
    finally:
        context.join = join


def when_told(entry: Callable[..., Any], *args: Any) -> Any:
    """Return entry(*args), in a worker; if SIGTERM was what ended it, the process ends a moment later.

    Workers wait to be told that all have returned. A launcher that was sent SIGTERM no longer tells them, and would
    kill them after 30 s: as long as SLURM and Kubernetes give it itself.
    """
    result = entry(*args)
    if asked_to_stop():
        sys.stdout.flush()
        leave = threading.Timer(_MOMENT, os._exit, (0,))
        leave.daemon = True
        leave.start()
    return result
