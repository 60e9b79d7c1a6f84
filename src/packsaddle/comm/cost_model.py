"""The collectives of an exchange before they happen: the bytes each worker moves, and what the last of them waits for.

Costs are those of gloo's algorithms, as measured (experiments/scale). NCCL's rings are the same; its all-to-all and its
all-gather of two workers use a link both ways at once, and its broadcast is a pipelined ring.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from packsaddle.comm.communicator import ring_all_gather, ring_all_reduce, star_broadcast
from packsaddle.comm.ledger import Bytes


@dataclass(frozen=True)
class Cost:
    """The cost of an exchange, from its start to its end on the last worker; costs in sequence add up."""

    hops: int = 0  # messages that wait for one another
    fan: int = 0  # further messages of one worker: they leave, or arrive, together with another
    bytes: float = 0.0  # one after another through the busiest link

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.hops + other.hops, self.fan + other.fan, self.bytes + other.bytes)


class Collective(ABC):
    """One collective of W workers."""

    @abstractmethod
    def wire(self, rank: int, workers: int) -> Bytes:
        """Return the bytes of one worker, as the ledger counts them."""

    @abstractmethod
    def cost(self, workers: int) -> Cost:
        """Return what the last worker waits for; nothing for one worker or an empty message."""


@dataclass(frozen=True)
class RingAllReduce(Collective):
    """An all-reduce of messages that travel as one, of these sizes in bytes."""

    payloads: tuple[int, ...]

    def wire(self, rank: int, workers: int) -> Bytes:
        return sum((ring_all_reduce(n, workers) for n in self.payloads), Bytes())

    def cost(self, workers: int) -> Cost:
        hops = 2 * (workers - 1) if any(self.payloads) else 0
        return Cost(hops, 0, hops * sum(self.payloads) / workers)


@dataclass(frozen=True)
class RingAllGather(Collective):
    """An all-gather of messages of `payload` bytes each."""

    payload: int

    def wire(self, rank: int, workers: int) -> Bytes:
        return ring_all_gather(self.payload, workers)

    def cost(self, workers: int) -> Cost:
        """Two workers have one connection, and gloo says "ready to receive" on it after its own first half.

        So whoever comes later sends that half before the other can start: one and a half messages one after another.
        """
        hops = workers - 1 if self.payload else 0
        return Cost(hops, 0, hops * self.payload * (1.5 if workers == 2 else 1))


@dataclass(frozen=True)
class AllToAll(Collective):
    """Every worker sends sizes[j] bytes to worker j."""

    sizes: Sequence[int]
    to_self: bool = True  # whether what a worker keeps is part of its payload

    def wire(self, rank: int, workers: int) -> Bytes:
        total, own = sum(self.sizes), self.sizes[rank]
        return Bytes(total if self.to_self else total - own, total - own, (workers - 1) * own)

    def cost(self, workers: int) -> Cost:
        """All messages are posted at once, but a link is not always busy both ways.

        A pair of workers has one connection, and gloo says "ready to receive" on it after its own message. So with two,
        whoever comes later sends all before the other starts. With more, others fill some of the time: 3 and 4 were
        measured half-way between both ways at once and one after the other.
        """
        if workers == 1 or not any(self.sizes):
            return Cost()
        total, widest, narrowest = sum(self.sizes), max(self.sizes), min(self.sizes)
        one_way = max(total - narrowest, (workers - 1) * widest)
        both_ways = total + (workers - 2) * widest  # sent and received by the owner of the widest
        return Cost(1, workers - 2, both_ways if workers == 2 else (one_way + both_ways) / 2)


@dataclass(frozen=True)
class Broadcast(Collective):
    """A broadcast of `payload` bytes from rank 0."""

    payload: int

    def wire(self, rank: int, workers: int) -> Bytes:
        return star_broadcast(self.payload, rank, workers)

    def cost(self, workers: int) -> Cost:
        """gloo's is a binomial tree, whose root posts all its ceil(log2 W) sends at once.

        They share its link, so the first child gets the message when the last does, and only then starts to send
        to its own children; so does its first child, and so on: about log2(W)^2 / 2 messages one after another.
        """
        depth = (workers - 1).bit_length() if self.payload else 0
        children = [sum((1 << i) - 1 + (1 << j) < workers for j in range(i, depth)) for i in range(depth)]
        levels = sum(n > 0 for n in children)
        return Cost(levels, sum(children) - levels, sum(children) * self.payload)
