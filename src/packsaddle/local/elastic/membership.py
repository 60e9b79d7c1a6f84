"""One worker's membership in a run whose workers join and leave: the worker's name, its counts of steps and rounds, its
exchanges in doubt, and the records of all workers.

An exchange is in doubt while another worker may have committed it and this worker cannot determine that. A round ends
with a confirmation, i.e. an all-gather after the exchange, and a vote of the workers (see `workers`). The exchange is
in doubt from the start of this worker's confirmation until the vote or, if the confirmation fails, until the next
quorum, i.e. until the workers of the next round are determined.
"""

import os
from collections.abc import Sequence

from packsaddle.comm.group import Group
from packsaddle.feedback.state import Value, attribute, skip
from packsaddle.local.elastic.roster import Account, Roster
from packsaddle.local.elastic.site import Site
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import Elastic
from packsaddle.local.schedule import Schedule


class Membership:
    """This worker's name, its counts of steps and rounds, the fragments of its model, and the records of all workers
    (`Roster`). `ElasticWorkers` is a subclass, and the objects that run parts of its rounds have a reference to it.

    Args:
        settings: the settings of this worker.
        within: the processes of this worker; None: it is one process.
        fragments: the parts of the model, each of which is exchanged separately.
        schedule: the steps after which a fragment is exchanged.
    """

    def __init__(
        self, settings: Elastic, within: Group | None, fragments: Sequence[Fragment], schedule: Schedule
    ) -> None:
        self.settings, self.fragments, self._schedule = settings, fragments, schedule
        self.site = Site(within, fragments)
        # The random name of this worker, identical on all processes of its site.
        self.worker: int = self.site.send(int.from_bytes(os.urandom(8), "little") >> 1, 0)
        self.has_joined = False
        self.steps = 0  # inner steps; a new worker starts at the count of the worker that sent its state
        self.account = Account()
        self.roster = Roster()  # records of all workers, identical on all workers after a round
        self.in_doubt: Sequence[Fragment] = ()  # fragments whose exchanges are in doubt; empty: none

    @property
    def rounds(self) -> int:
        """The number of applied exchanges, summed over the fragments (parts of the model)."""
        return sum(part.rounds for part in self.fragments)

    @property
    def due(self) -> Fragment:
        """The fragment (part of the model) that the next round exchanges. A round that sends all pending updates
        exchanges all fragments instead."""
        return self.fragments[self._schedule.in_rotation(self.rounds)]

    @property
    def workers(self) -> int:
        """The number of workers in the last round."""
        return len(self.roster.present)

    def weight(self) -> float:
        """Return the weight that this worker's update would have in a round now; collective over the processes of this
        worker. If `Elastic.weight` is a function, the values that it returns on these processes are summed."""
        rule = self.settings.weight
        return self.account.weight((lambda: sum(self.site.gather(float(rule())))) if callable(rule) else rule)

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
        for part in self.fragments:
            part.roll_back()

    def has_pending(self) -> bool:
        """Return True if this worker has joined, and has updates that a round would send. Updates of frozen parameters
        are not sent, so they do not count."""
        if not self.has_joined:
            return False
        for part in self.fragments:
            frozen, pending = part.frozen_next, part.by_name(part.unapplied())
            if any(name not in frozen and bool(view.any()) for name, view in pending.items()):
                return True
        return False

    def fields(self) -> list[Value]:
        """Return the fields of the saved state that belong to membership: this worker's name and its counts
        (`Account`), and the records of all workers (`Roster`)."""
        path, share = ("membership",), Value(("share",), float, lambda: 1.0, skip)
        own = attribute((*path, "worker"), self, "worker", int), attribute((*path, "account"), self, "account", Account)
        return [share, *own, *self.roster.fields((*path, "roster"))]
