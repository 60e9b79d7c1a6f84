"""The records of a run whose workers come and go: the roster, identical on all workers, and each one's own account.

A `Roster` has the rounds, their workers and the norms of their memories. It changes when a round is committed, by the
`Hello` of each worker, its greeting at the start of the round. So it is identical on all that were in the round; a
newcomer gets it with the anchor. An `Account` has one worker's attempts, inner steps, weights and norms.
"""

import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from packsaddle.errors import ConfigError
from packsaddle.feedback.state import Path, Value, attribute
from packsaddle.numerics.seeds import mix

_log = logging.getLogger("packsaddle")
_REMEMBERED = 256  # workers
_PAST = 64  # rounds


@dataclass(frozen=True)
class Hello:
    """A worker's greeting at the start of a round: integers below 2^63, and reals."""

    worker: int  # its name
    arguments: int  # a hash of the arguments that must be equal on all workers
    history: int  # a hash of the rounds that made its anchor
    anchor: int  # its fingerprint; 0: not compared in this round
    run: int
    attempt: int
    steps: int  # inner steps since the last round that has its update
    dense: int  # 1: requests a round that sends all pending updates
    keeps: int  # 1: its file has its memory after its last round
    weight: float
    idle_weight: float  # in a dense round, if it has not moved
    seconds: float  # of an inner step; 0: unknown
    lost: float  # the norm of memories that it found to be lost

    def packed(self, device: torch.device) -> Tensor:
        """Return the hello as int64[13]."""
        *whole, a, b, c, d = astuple(self)
        reals = torch.tensor([a, b, c, d], dtype=torch.float64).view(torch.int64)
        return torch.cat([torch.tensor(whole, dtype=torch.int64), reals]).to(device)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Hello":
        """Return the hello of `packed`, int64[13]."""
        here = packed.cpu()
        whole = len(fields(cls)) - 4
        return cls(*here[:whole].tolist(), *here[whole:].clone().view(torch.float64).tolist())


def most(values: Sequence[Any]) -> Any:
    """Return the most frequent value; of several, the first."""
    return Counter(values).most_common(1)[0][0]


@dataclass(frozen=True)
class Member:
    """A worker, as it was in its last round."""

    norm: float  # of its memory after the last round that it was in
    keeps: bool  # its file is written, as far as is known
    here: bool  # was in the last round


class Roster:
    """The run's name, a hash of its rounds, the number of inner steps in the anchor, and its workers."""

    def __init__(self) -> None:
        self.run = 0  # 0: none has been committed
        self.position = 0  # inner steps
        self.gone = 0.0  # the sum of the norms of lost memories
        self.history = 0
        self.past: deque[int] = deque(maxlen=_PAST)  # histories
        self.taken: dict[int, int] = {}  # by worker: its last attempt at a round that is in the anchor
        self.members: dict[int, Member] = {}  # in the order of their last rounds

    def absent(self, *, keeps: bool) -> float:
        """Return the sum of the norms of absent workers' memories, of those that have a file, or of the others."""
        return sum(m.norm for m in self.members.values() if not m.here and m.keeps == keeps)

    def commit(self, hellos: Sequence[Hello], weights: Sequence[float], norms: Sequence[float], *, taken: bool) -> None:
        """Record a committed round, by rank; `taken`: it moved the anchor."""
        # The first round names the run; updates with a weight are in the anchor.
        names = {hello.worker for hello in hellos}
        self.run = self.run or next((h.run for h in hellos if h.run), 0) or mix(*sorted(names)) >> 1
        for hello, weight in zip(hellos, weights, strict=True):
            if weight:
                self.taken[hello.worker] = hello.attempt
                self.position += hello.steps if taken else 0
            self.gone += hello.lost
        # One hash of all rounds tells anchors apart.
        self.history = mix(self.history, *(word for h in hellos for word in (h.worker, h.attempt))) >> 1
        self.past.append(self.history)
        # Workers move to the end in each of their rounds, so the first is the one longest away.
        for worker, member in self.members.items():
            if worker not in names:
                self.members[worker] = Member(member.norm, member.keeps, False)
        for hello, norm in zip(hellos, norms, strict=True):
            before = self.members.pop(hello.worker, Member(0.0, False, False))
            self.members[hello.worker] = Member(norm if taken else before.norm, bool(hello.keeps), True)
        while len(self.members) > max(_REMEMBERED, len(names)):
            oldest = next(iter(self.members))
            self.gone += self.members.pop(oldest).norm
            self.taken.pop(oldest, None)

    def missed(self, hellos: Sequence[Hello]) -> dict[int, Member]:
        """Return the workers of the last round that are not in this one, by name."""
        names = {hello.worker for hello in hellos}
        return {worker: m for worker, m in self.members.items() if m.here and worker not in names}

    def fields(self, path: Path) -> list[Value]:
        """Return the fields of the saved state, below a path."""
        return [
            *(attribute((*path, name), self, name, int) for name in ("run", "position", "history")),
            attribute((*path, "gone"), self, "gone", float),
            Value((*path, "past"), list[int], lambda: list(self.past), self._load_past),
            attribute((*path, "included"), self, "taken", dict[int, int]),
            attribute((*path, "members"), self, "members", dict[int, Member]),
        ]

    def _load_past(self, saved: Sequence[int]) -> None:
        self.past = deque(saved, maxlen=_PAST)


@dataclass
class Account:
    """One worker's own counts; norms are of its error memory."""

    attempts: int = 0  # at rounds
    included: int = 0  # the last of them that is in the anchor
    since: int = 0  # inner steps since then
    ahead: int = 0  # inner steps since the last round
    counted: float = 0.0  # the part of the weight function's total that is in earlier rounds
    last_weight: float = 1.0  # in the last round with its update
    norm: float = 0.0  # after the last round
    sent: float = 0.0  # of its message in its last round
    found_lost: float = 0.0  # found to be lost, and not reported to the others yet

    def step(self) -> None:
        """Count an inner step."""
        self.since += 1
        self.ahead += 1

    def weight(self, rule: Literal["steps"] | Callable[[], float] | None) -> float:
        """Return w_i in a round now, by `Elastic.weight`; 0 for a worker that has not stepped.

        Raises ConfigError if the total is not finite or falls.
        """
        if not self.since:
            return 0.0
        if rule is None:
            return 1.0
        found = float(self.since) if rule == "steps" else float(rule()) - self.counted
        if not (math.isfinite(found) and found >= 0):
            raise ConfigError(f"weight must return a total that is finite and does not fall, got {found:+g} more")
        return found

    def start_count(self, weight: float) -> None:
        """Restart the count of inner steps, after a round has included them with this weight."""
        self.since, self.counted, self.last_weight = 0, self.counted + weight, weight or self.last_weight
