"""One worker's membership in a run whose workers join and leave: the worker's name, its counts of steps and rounds, and
the records of all workers."""

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

    def fields(self) -> list[Value]:
        """Return the fields of the saved state that belong to membership: this worker's name and its counts
        (`Account`), and the records of all workers (`Roster`)."""
        path, share = ("membership",), Value(("share",), float, lambda: 1.0, skip)
        own = attribute((*path, "worker"), self, "worker", int), attribute((*path, "account"), self, "account", Account)
        return [share, *own, *self.roster.fields((*path, "roster"))]
