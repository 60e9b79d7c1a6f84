"""This worker's pending updates, which the anchor does not include: they are in its error memories and parameters, and
in an exchange in doubt.

An exchange is in doubt while another worker may have committed it and this worker cannot determine that. A round ends
with a confirmation, i.e. an all-gather after the exchange, and a vote of the workers (see `workers`). The exchange is
in doubt from the start of this worker's confirmation until the vote or, if the confirmation fails, until the next
quorum, i.e. until the workers of the next round are determined.
"""

from collections.abc import Sequence

from packsaddle.local.elastic.membership import Membership
from packsaddle.local.fragment import Fragment


class PendingUpdates:
    """The updates of this worker that the anchor (the parameters last agreed on) does not include. `own` is this
    worker's membership, with its fragments."""

    def __init__(self, own: Membership) -> None:
        self._own, self._fragments = own, own.fragments
        self.in_doubt: Sequence[Fragment] = ()  # fragments whose exchanges are in doubt; empty: none

    def close_exchanges(self) -> bool:
        """Commit the exchanges in doubt; return True if all of them are applied, and False if one is rejected."""
        parts, self.in_doubt = self.in_doubt, ()
        # Close every exchange before calling `all`, since `all` with a generator would stop at the first rejected
        # exchange.
        applied = [part.current.close() for part in parts if part.current is not None]
        return all(applied)

    def roll_back(self) -> None:
        """Roll back the exchanges of the round in progress, if there is one. No exchange is in doubt then."""
        self.in_doubt = ()
        for part in self._fragments:
            part.roll_back()

    def exist(self) -> bool:
        """Return True if this worker has joined, and has updates that a round would send. Updates of frozen parameters
        are not sent, so they do not count."""
        if not self._own.has_joined:
            return False
        for part in self._fragments:
            frozen, pending = part.frozen_next, part.by_name(part.unapplied())
            if any(name not in frozen and bool(view.any()) for name, view in pending.items()):
                return True
        return False
