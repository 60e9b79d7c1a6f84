"""A warning about local updates that end without `flush`: each worker then has a model of its own."""

import logging
import sys
import weakref

_log = logging.getLogger("packsaddle")


class UnsentSteps:
    """Records steps that followed the last `flush`, checkpoint or use of the anchor; logs them once `owner` ends.

    It ends at garbage collection or interpreter exit. No-op without an owner, and while an exception ends the script.
    """

    def __init__(self, owner: object | None) -> None:
        self._steps = self._exchanged = 0
        self._is_pending = False
        if owner is not None:
            weakref.finalize(owner, self._warn)  # also at interpreter exit

    def record(self, steps: int, *, exchanged: bool) -> None:
        """Record an inner step, and that a round followed it."""
        self._steps, self._is_pending = steps, True
        self._exchanged = steps if exchanged else self._exchanged

    def clear(self) -> None:
        """Record that the workers agree on one model, or that it was read or saved."""
        self._is_pending = False

    def _warn(self) -> None:
        if self._is_pending and sys.exc_info()[0] is None and not hasattr(sys, "last_type"):
            _log.warning(
                "LocalUpdates ended without flush() after %d steps, %d of them since its last round, so the workers' "
                "models differ: call local.flush() after the last step, or save local.state_dict_of(model)",
                *(self._steps, self._steps - self._exchanged),
            )
