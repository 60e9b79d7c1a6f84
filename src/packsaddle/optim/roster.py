"""The common knowledge of a run whose workers come and go: its rounds, their workers, the fate of memories.

It changes when a round is committed, by what workers said in it, so it is the same on all that were in the round; a
newcomer gets it with the anchor. A worker's `Hello` is its greeting at the start of a round.
"""

import logging
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from packsaddle.numerics.seeds import mix

_log = logging.getLogger("packsaddle")
_REMEMBERED = 256  # workers
_PAST = 64  # rounds


@dataclass(frozen=True)
class Hello:
    """A worker's account of itself at the start of a round; whole numbers below 2^63, and reals."""

    worker: int  # its name
    arguments: int  # a hash of what all must have been given
    history: int  # a hash of the rounds that made its anchor
    anchor: int  # its fingerprint, where that is compared in this round
    run: int
    attempt: int
    steps: int  # inner steps since the last round that has its update
    dense: int  # 1: asks for a round in which all that is pending is sent
    keeps: int  # 1: its file has its memory after its last round
    weight: float
    idle_weight: float  # in a dense round, if it has not moved
    seconds: float  # of an inner step; 0: unknown
    lost: float  # a norm, of what it has found to be lost

    def packed(self, device: torch.device) -> Tensor:
        """Return it as int64[13]."""
        *whole, a, b, c, d = astuple(self)
        reals = torch.tensor([a, b, c, d], dtype=torch.float64).view(torch.int64)
        return torch.cat([torch.tensor(whole, dtype=torch.int64), reals]).to(device)

    @classmethod
    def unpacked(cls, packed: Tensor) -> "Hello":
        """Return what int64[13] says."""
        here = packed.cpu()
        whole = len(fields(cls)) - 4
        return cls(*here[:whole].tolist(), *here[whole:].clone().view(torch.float64).tolist())


def most(values: Sequence[Any]) -> Any:
    """Return the value that most have; of several, the one that comes first."""
    return Counter(values).most_common(1)[0][0]


@dataclass(frozen=True)
class Member:
    """A worker, as it was in its last round."""

    norm: float  # of its memory after the last round that it was in
    keeps: bool  # its file is written, as far as is known
    here: bool  # was in the last round


class Roster:
    """The run's name, its rounds as one hash, how many inner steps are in the anchor, and its workers."""

    def __init__(self) -> None:
        self.run = 0  # 0: none has been committed
        self.position = 0  # inner steps
        self.gone = 0.0  # the sum of the norms of lost memories
        self.history = 0
        self.past: deque[int] = deque(maxlen=_PAST)  # histories
        self.taken: dict[int, int] = {}  # by worker: its last attempt at a round that is in the anchor
        self.members: dict[int, Member] = {}  # in the order of when they were here last

    def absent(self, *, keeps: bool) -> float:
        """Return the sum of the norms of absent workers' memories, of those that have a file, or of the others."""
        return sum(m.norm for m in self.members.values() if not m.here and m.keeps == keeps)

    def commit(self, hellos: Sequence[Hello], weights: Sequence[float], norms: Sequence[float], *, taken: bool) -> None:
        """Enter a round, by rank; `taken`: it moved the anchor."""
        names = {hello.worker for hello in hellos}
        self.run = self.run or next((h.run for h in hellos if h.run), 0) or mix(*sorted(names)) >> 1
        for hello, weight in zip(hellos, weights, strict=True):
            if weight:
                self.taken[hello.worker] = hello.attempt
                self.position += hello.steps if taken else 0
            self.gone += hello.lost
        self.history = mix(self.history, *(word for h in hellos for word in (h.worker, h.attempt))) >> 1
        self.past.append(self.history)
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
        """Return who was in the last round and is not in this one, by name."""
        names = {hello.worker for hello in hellos}
        return {worker: m for worker, m in self.members.items() if m.here and worker not in names}

    def state_dict(self) -> dict[str, Any]:
        """Return it as plain types."""
        return {
            "run": self.run,
            "position": self.position,
            "gone": self.gone,
            "history": self.history,
            "past": list(self.past),
            "taken": dict(self.taken),
            "members": {worker: astuple(member) for worker, member in self.members.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.run, self.position, self.gone = state["run"], state["position"], state["gone"]
        self.history, self.taken = state["history"], dict(state["taken"])
        self.past = deque(state["past"], maxlen=_PAST)
        self.members = {worker: Member(*member) for worker, member in state["members"].items()}
