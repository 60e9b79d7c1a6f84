"""A warning if local training ends without `LocalUpdates.flush`: the workers' models then differ."""

import logging
import sys
import weakref

_log = logging.getLogger("packsaddle")


class UnsentSteps:
    """Logs a warning if `owner` ends after steps since the last `flush`, checkpoint or use of the anchor.

    `owner` ends at garbage collection or interpreter exit. No-op without an owner, or if an exception ends the script.
    """

    def __init__(self, owner: object | None) -> None:
        self._steps = self._exchanged = 0
        self._is_pending = False
        if owner is not None:
            weakref.finalize(owner, self._warn)  # also at interpreter exit

    def record(self, steps: int, *, exchanged: bool) -> None:
        """Record the number of inner steps after one of them; `exchanged`: a round followed it."""
        self._steps, self._is_pending = steps, True
        self._exchanged = steps if exchanged else self._exchanged

    def clear(self) -> None:
        """Clear the warning: the workers have the same model, or the anchor was read or saved."""
        self._is_pending = False

    def _warn(self) -> None:
        if self._is_pending and sys.exc_info()[0] is None and not hasattr(sys, "last_type"):
            _log.warning(
                "LocalUpdates ended without flush() after %d steps, %d of them since its last round, so the workers' "
                "models differ: call local.flush() after the last step, or save local.state_dict_of(model)",
                *(self._steps, self._steps - self._exchanged),
            )
