"""Settings of a worker in a run whose workers come and go; `membership` has its rounds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Weight = Literal["steps"] | Callable[[], float]


@dataclass(frozen=True)
class Elastic:
    """The part of a worker in a run whose workers come and go.

    A Manager alone stands for `Elastic(manager)` wherever one is taken.

    Args:
        manager: a torchft Manager with use_async_quorum=False (see `packsaddle.comm.connect`).
        memory: a file of this worker's own in which its error memory waits while it is away; one that is there when it
            joins is taken up. It is written on joining, after every round, and on leaving, and locked by MEMORY.lock.
        weight: of a worker in the mean. None: all that have moved count alike; "steps": its inner steps since its last
            round; or a function that returns what it has trained on in all so far, tokens say, of which the growth
            counts. With a weight a slower worker does fewer inner steps before a round, to come when the fastest does.
        inner: a newcomer begins with the inner optimizer's state of the worker that it has the anchor from.
        patience: seconds in which a round must come about, or PeerLostError is raised.
        leave_on_sigterm: on SIGTERM hand over the memory and end the process, by SystemExit out of the inner step or
            out of waiting for the others. Without a file, or if it cannot be written, the memory goes with one more
            round, uncompressed. The exit code is 0, or 1 if no such round came about: then something is lost.
        grace: seconds after SIGTERM, or after a call of `leave`, in which that round must come about.

    Raises TypeError if the manager is none, and ValueError for a setting that is out of range.

    >>> from packsaddle import Elastic, LocalUpdates  # doctest: +SKIP
    >>> from packsaddle.comm import connect  # doctest: +SKIP
    >>> elastic = Elastic(connect("http://10.0.0.1:29510"), memory="worker-3.memory", weight="steps")  # doctest: +SKIP
    >>> local = LocalUpdates(optimizer, manager=elastic)  # doctest: +SKIP
    """

    manager: Any
    memory: str | Path | None = None
    weight: Weight | None = None
    inner: bool = True
    patience: float = 3600.0
    leave_on_sigterm: bool = True
    grace: float = 25.0

    def __post_init__(self) -> None:
        if not hasattr(self.manager, "start_quorum"):
            raise TypeError(f"manager must be a torchft Manager, got {type(self.manager).__name__}")
        if getattr(self.manager, "_use_async_quorum", False):
            raise ValueError("manager must have use_async_quorum=False: state must not change between two rounds")
        if not (self.weight is None or self.weight == "steps" or callable(self.weight)):
            raise ValueError(f'weight must be None, "steps" or a function, got {self.weight!r}')
        if self.memory is not None:
            object.__setattr__(self, "memory", Path(self.memory))
        for name in ("patience", "grace"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0 seconds, got {getattr(self, name)!r}")

    @classmethod
    def of(cls, given: Any) -> "Elastic":
        """Return what was given, a Manager with everything else at its default."""
        return given if isinstance(given, Elastic) else cls(given)
