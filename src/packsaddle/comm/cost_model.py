"""Predicted cost of collectives: each worker's bytes, and the critical path until the last worker has finished.

Costs are those of gloo's algorithms, as measured (experiments/scale). NCCL's rings are the same; its all-to-all and its
all-gather of two workers use both directions of a link simultaneously, and its broadcast is a pipelined ring.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from packsaddle.comm.communicator import ring_all_gather, ring_all_reduce, star_broadcast
from packsaddle.comm.ledger import Bytes


@dataclass(frozen=True)
class Cost:
    """Critical path of an exchange, from its start to its end on the last worker. Consecutive costs add."""

    hops: int = 0  # sequential messages
    fan: int = 0  # additional messages that one worker sends or receives concurrently with these
    bytes: float = 0.0  # transferred sequentially over the busiest link

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.hops + other.hops, self.fan + other.fan, self.bytes + other.bytes)


class Collective(ABC):
    """One collective of W workers."""

    @abstractmethod
    def wire(self, rank: int, workers: int) -> Bytes:
        """Return the bytes of one worker, as the ledger counts them."""

    @abstractmethod
    def cost(self, workers: int) -> Cost:
        """Return the critical path; zero for one worker or an empty message."""


@dataclass(frozen=True)
class RingAllReduce(Collective):
    """One all-reduce of concatenated messages, of these sizes in bytes."""

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
        """Two workers share one connection, on which gloo signals "ready to receive" after sending its first half.

        So the later worker sends this half before the other can start: one and a half sequential messages.
        """
        hops = workers - 1 if self.payload else 0
        return Cost(hops, 0, hops * self.payload * (1.5 if workers == 2 else 1))


@dataclass(frozen=True)
class AllToAll(Collective):
    """Every worker sends sizes[j] bytes to worker j."""

    sizes: Sequence[int]
    to_self: bool = True  # count a worker's message to itself in its payload

    def wire(self, rank: int, workers: int) -> Bytes:
        total, own = sum(self.sizes), self.sizes[rank]
        return Bytes(total if self.to_self else total - own, total - own, (workers - 1) * own)

    def cost(self, workers: int) -> Cost:
        """All messages are posted immediately, but links are not always used in both directions.

        Two workers share one connection, on which gloo signals "ready to receive" after sending its own message. So
        with two, the later worker sends everything before the other starts. With more, other pairs use some of the
        time: 3 and 4 workers measured halfway between simultaneous and sequential directions.
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
        """gloo uses a binomial tree, whose root posts all its ceil(log2 W) sends immediately.

        They share the root's link, so its first child receives the message as late as its last one, and then sends
        to its own children in the same way: about log2(W)^2 / 2 sequential messages.
        """
        depth = (workers - 1).bit_length() if self.payload else 0
        children = [sum((1 << i) - 1 + (1 << j) < workers for j in range(i, depth)) for i in range(depth)]
        levels = sum(n > 0 for n in children)
        return Cost(levels, sum(children) - levels, sum(children) * self.payload)
