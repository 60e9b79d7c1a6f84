"""How long launched workers have to end after one of them has failed."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.multiprocessing.spawn import ProcessContext

SECONDS = 3.0  # before SIGTERM, and then before SIGKILL


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
