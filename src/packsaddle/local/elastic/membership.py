"""Who is in a run whose workers join and leave: `Roster` is the records of all workers, `Membership` one worker's own.

A `Roster` records the rounds and their workers. It is updated when a round is committed, from the `Hello` that each
worker sends at the start of the round, and is then identical on all workers. A new worker receives it with the anchor
(the parameters on which all workers last agreed). A worker may be a `Site` of several processes, which decide together.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from packsaddle.comm.communicator import ObjectCollectives
from packsaddle.comm.group import Group, Solo
from packsaddle.comm.sharding import is_split
from packsaddle.comm.sites import fail_together
from packsaddle.errors import ConfigError
from packsaddle.feedback.state import Path, Value, attribute, skip
from packsaddle.local.fragment import Fragment
from packsaddle.local.options import Elastic
from packsaddle.local.round import Begun, Ended, Sent, close, roll_back
from packsaddle.local.schedule import Rotation
from packsaddle.numerics.seeds import mix

_REMEMBERED = 256  # maximum number of workers in `Roster.included`; if a round has more workers, their number
_PAST = 64  # number of the latest committed rounds for which the roster stores the hash `history`


@dataclass(frozen=True)
class Hello:
    """The message that each worker sends about itself at the start of a round: integers below 2^63, and floats."""

    worker: int  # the worker's random name
    arguments: int  # hash of the arguments that must be equal on all workers
    message: int  # hash of a text that describes the worker's compressed message, see `Greeting`
    history: int  # hash of all rounds that the worker's anchor includes
    anchor: int  # fingerprint of the worker's anchor; 0: not compared in this round
    run: int  # id of the run (see `Roster.run`); 0: no round has been committed
    attempt: int  # number of the worker's attempts at rounds, including this one
    steps: int  # the worker's inner steps since the last applied round that included its update
    dense: int  # 1: the worker requests a round that sends all pending updates
    has_pending: int  # 1: `weight` is 0, and the worker has updates to send in a round with dense = 1
    frozen: int  # hash of the names of the worker's frozen parameters
    weight: float  # the worker's weight in the mean; 0: the worker only receives the mean
    idle_weight: float  # the worker's weight in a round in which a worker has dense = 1, if `weight` is 0
    seconds: float  # seconds per inner step of the worker; 0: unknown

    def packed(self, device: torch.device) -> Tensor:
        """Return this message as int64[14] on `device`: one element per field, in the order of the fields. Floats are
        stored as the bit patterns of float64."""
        *whole, weight, idle_weight, seconds = astuple(self)
        reals = torch.tensor([weight, idle_weight, seconds], dtype=torch.float64).view(torch.int64)
        return torch.cat([torch.tensor(whole, dtype=torch.int64), reals]).to(device)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Hello":
        here = packed.cpu()
        whole = len(fields(cls)) - 3
        return cls(*here[:whole].tolist(), *here[whole:].clone().view(torch.float64).tolist())


def most(values: Sequence[Any]) -> Any:
    """Return the most frequent of `values` or, in a tie, the one that comes first in `values`."""
    return Counter(values).most_common(1)[0][0]


class Roster:
    """Records of a run whose workers join and leave, identical on all workers after a round: the run's id, a hash of
    its rounds, its number of inner steps, and the last attempt of each worker."""

    def __init__(self) -> None:
        self.run = 0  # id of the run; 0: no round has been committed
        self.position = 0  # number of inner steps, of all workers, whose updates the anchor includes
        self.history = 0  # hash of all committed rounds
        self.past: list[int] = []  # value of `history` after each of the last committed rounds, oldest first
        self.present: list[int] = []  # ids of the workers in the last round, by rank
        # By id of the worker, the number of its last attempt at a round that was committed with its update, in the
        # order of these rounds.
        self.included: dict[int, int] = {}

    def commit(self, hellos: Sequence[Hello], weights: Sequence[float], *, applied: bool) -> None:
        """Record a committed round. `hellos` and `weights` have one entry per worker, by rank: its message, and its
        weight in the mean. `applied` is True if the round was applied, and False if it was rejected."""
        # The first committed round sets the id of the run, a hash of the names of that round's workers. Later rounds do
        # not change the id.
        self.present = [hello.worker for hello in hellos]
        self.run = self.run or next((h.run for h in hellos if h.run), 0) or mix(*sorted(self.present)) >> 1
        # The anchor does not include an update with weight 0. So do not record its worker's attempt in `included`, and
        # do not add its worker's inner steps to `position`.
        for hello, weight in zip(hellos, weights, strict=True):
            if weight:
                self.included.pop(hello.worker, None)  # so that the new entry is the last one
                self.included[hello.worker] = hello.attempt
                self.position += hello.steps if applied else 0
        while len(self.included) > max(_REMEMBERED, len(hellos)):
            del self.included[next(iter(self.included))]
        # Hash the round into the history, so that anchors of different rounds have different hashes.
        self.history = mix(self.history, *(word for h in hellos for word in (h.worker, h.attempt))) >> 1
        self.past = [*self.past, self.history][-_PAST:]

    def fields(self, path: Path) -> list[Value]:
        return [
            *(attribute((*path, name), self, name, int) for name in ("run", "position", "history")),
            attribute((*path, "past"), self, "past", list[int]),
            attribute((*path, "present"), self, "present", list[int]),
            attribute((*path, "included"), self, "included", dict[int, int]),
        ]


@dataclass
class Account:
    """One worker's record of the rounds that it was in: counts of its attempts at rounds and of its inner steps, and
    the weights of its updates in the workers' mean."""

    attempts: int = 0  # number of the worker's attempts at rounds, committed or not
    included: int = 0  # number of its last attempt at a round that was committed with its update
    since: int = 0  # inner steps since the last applied round that included the worker's update
    ahead: int = 0  # inner steps since the last round, applied or rejected
    counted: float = 0.0  # sum of the worker's weights so far, to subtract from the weight function's total
    last_weight: float = 1.0  # weight in the last applied round that included the worker's update

    def weight(self, rule: Literal["steps"] | Callable[[], float] | None) -> float:
        """Return the weight that this worker has in a round now. `rule` is `Elastic.weight`. The weight is 0 if the
        worker has not stepped since the last round that included its update. Raises ConfigError if the weight
        function's total is not finite or decreases."""
        if not self.since:
            return 0.0
        if rule is None:
            return 1.0
        found = float(self.since) if rule == "steps" else float(rule()) - self.counted
        if not (math.isfinite(found) and found >= 0):
            raise ConfigError(f"weight must return a total that is finite and does not fall, got {found:+g} more")
        return found

    def start_count(self, weight: float) -> None:
        """Restart the count of inner steps, `since`. Call after an applied round that included these steps. `weight` is
        the weight that the worker's update had in the round, or 0."""
        self.since, self.counted, self.last_weight = 0, self.counted + weight, weight or self.last_weight


class Site(ObjectCollectives):
    """The processes that together are this worker, and their collectives. All decisions about a round, such as whether
    it is committed, must be identical on the processes of a site.

    Args:
        within: the group of the processes; None: the worker is one process.
        fragments: the parts of the model that are exchanged separately. Each process has a shard of every parameter, or
            the whole model.
    """

    def __init__(self, within: Group | None, fragments: Sequence[Fragment]) -> None:
        splits = {is_split(p) for part in fragments for p in part.parameters}
        if within is not None and len(splits) > 1:
            raise ValueError("parameters must all be sharded in a site with a manager, or none, and some are not")
        super().__init__(within or Solo(), torch.device("cpu"))
        self.size = self.group.size
        # True if the site has several processes, each of which has the whole model.
        self.has_replicas = within is not None and splits == {False}

    def totals(self, *numbers: int) -> list[int]:
        """Return each of the `numbers` summed over the processes of this worker; collective over them. The sums are
        int64, modulo 2^64."""
        totals = torch.tensor(numbers, dtype=torch.int64)
        self.group.all_reduce(totals)
        return totals.tolist()

    def any(self, flag: bool) -> bool:
        """Return True if `flag` is True on at least one of this worker's processes; collective over them."""
        return self.totals(flag)[0] > 0

    def fails_together(self) -> AbstractContextManager[None]:
        """Context manager that raises an error on all processes of this worker if its block raises an error on one of
        them."""
        return fail_together(self.group)


@dataclass(frozen=True)
class Attempt:
    """One attempt at a round, in which the workers have exchanged their updates, but have not voted yet."""

    hellos: Sequence[Hello]  # the messages with which the workers started the round, by rank
    weights: Sequence[float]  # weights w_i of the workers in the mean, by rank
    sent: Sequence[Sent]  # the exchanges of the fragments (parts of the model)

    def end(self) -> list[Ended]:
        """Commit the exchanges, or roll back those that are rejected."""
        agrees = len({hello.frozen for hello in self.hellos}) == 1
        # Close every exchange before looking at the outcomes, since the processes of a site close them together.
        return [close(sent, agrees=agrees, names=[f"{h.worker:x}" for h in self.hellos]) for sent in self.sent]


class Membership:
    """One worker's membership in a run whose workers join and leave: the worker's name, its counts of steps and rounds,
    the fragments of its model, its exchanges in doubt, and the records of all workers (`Roster`).

    An exchange is in doubt while another worker may have committed it and this worker cannot determine that. A round
    ends with a confirmation, i.e. an all-gather after the exchange, and a vote of the workers (see `workers`). The
    exchange is in doubt from the start of this worker's confirmation until the vote or, if the confirmation fails,
    until the next quorum, i.e. until the workers of the next round are determined.

    Args:
        settings: the settings of this worker.
        within: the processes of this worker; None: it is one process.
        fragments: the parts of the model, each of which is exchanged separately.
        rotation: the steps after which a fragment is exchanged.
    """

    def __init__(
        self, settings: Elastic, within: Group | None, fragments: Sequence[Fragment], rotation: Rotation
    ) -> None:
        self.settings, self.fragments, self.rotation = settings, fragments, rotation
        self.site = Site(within, fragments)
        # The random name of this worker, identical on all processes of its site.
        self.worker: int = self.site.send(int.from_bytes(os.urandom(8), "little") >> 1, 0)
        self.has_joined = False
        self.steps = 0  # inner steps; a new worker starts at the count of the worker that sent its state
        self.account = Account()
        self.roster = Roster()  # records of all workers, identical on all workers after a round
        self.running: list[Begun | Sent] = []  # the exchanges of the attempt in progress
        self.in_doubt: Attempt | None = None  # the attempt whose exchanges are in doubt, if there is one

    @property
    def rounds(self) -> int:
        """The number of applied exchanges, summed over the fragments (parts of the model)."""
        return sum(part.rounds for part in self.fragments)

    @property
    def due(self) -> Fragment:
        """The fragment (part of the model) that the next round exchanges. A round that sends all pending updates
        exchanges all fragments instead."""
        return self.fragments[self.rotation.fragment(self.rounds)]

    def weight(self) -> float:
        """Return the weight that this worker's update would have in a round now; collective over the processes of this
        worker. If `Elastic.weight` is a function, the values that it returns on these processes are summed."""
        rule = self.settings.weight
        return self.account.weight((lambda: sum(self.site.gather(float(rule())))) if callable(rule) else rule)

    def end(self, attempt: Attempt) -> list[Ended]:
        """Commit the exchanges of an attempt, or roll back those that are rejected. None is in doubt then."""
        self.in_doubt, self.running = None, []
        return attempt.end()

    def roll_back(self) -> None:
        """Roll back the exchanges of the attempt in progress, if there is one. No exchange is in doubt then."""
        running, self.running, self.in_doubt = self.running, [], None
        for each in running:
            roll_back(each)

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
