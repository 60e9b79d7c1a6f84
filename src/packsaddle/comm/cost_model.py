"""Predicted cost of collectives: each worker's bytes, and the critical path until the last worker has finished.

Costs are those of gloo's algorithms, as measured (experiments/scale). NCCL's rings have the same costs as gloo's. Other
collectives of NCCL differ from gloo's: its all-to-all, and its all-gather between two workers, use both directions of a
link simultaneously, and its broadcast is a pipelined ring.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from packsaddle.comm.communicator import ring_all_gather, ring_all_reduce, star_broadcast
from packsaddle.comm.group import SMALL
from packsaddle.comm.ledger import Bytes
from packsaddle.compressors import Compressor


@dataclass(frozen=True)
class Cost:
    """Critical path of an exchange, from its start to its end on the last worker. The costs of consecutive exchanges
    add up."""

    hops: int = 0  # number of sequential messages
    # Number of additional messages that one worker sends or receives concurrently with the sequential messages.
    fan: int = 0
    bytes: float = 0.0  # bytes transferred sequentially over the busiest link

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.hops + other.hops, self.fan + other.fan, self.bytes + other.bytes)


class Collective(ABC):
    """Cost model of one collective operation of W workers."""

    @abstractmethod
    def wire(self, rank: int, workers: int) -> Bytes:
        """Return the number of bytes that worker `rank` sends in this collective, and the number that it receives, as
        they are counted in the worker's `Ledger`."""

    @abstractmethod
    def cost(self, workers: int) -> Cost:
        """Return the critical path of the collective. All its costs are 0 if there is only one worker, or if the
        message is empty."""


@dataclass(frozen=True)
class RingAllReduce(Collective):
    """One ring all-reduce of several concatenated messages, whose sizes in bytes are `payloads`."""

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
        """Return the critical path: the bytes of W - 1 sequential messages, or of one and a half messages for two
        workers.

        Small messages are sent to all workers concurrently (`TorchGroup.all_gather`). Two workers share one connection,
        on which gloo signals "ready to receive" only after it has sent the first half of its own message. So one worker
        sends this half before the other worker can start to send.
        """
        others = workers - 1 if self.payload else 0
        hops = 1 if others > 1 and self.payload <= SMALL else others
        return Cost(hops, others - hops, others * self.payload * (1.5 if workers == 2 else 1))


@dataclass(frozen=True)
class AllToAll(Collective):
    """An all-to-all, in which every worker sends sizes[j] bytes to worker j."""

    sizes: Sequence[int]
    to_self: bool = True  # True if the payload includes a worker's message to itself

    def wire(self, rank: int, workers: int) -> Bytes:
        total, own = sum(self.sizes), self.sizes[rank]
        return Bytes(total if self.to_self else total - own, total - own, (workers - 1) * own)

    def cost(self, workers: int) -> Cost:
        """Return the critical path.

        All messages are posted immediately, but each pair of workers shares one connection, on which gloo signals
        "ready to receive" only after it has sent its own message. So one worker of a pair sends its whole message
        before the other one starts. With more than two workers, other pairs use part of the waiting time. The times
        measured with 3 and 4 workers are halfway between two predictions: that the messages of a pair are sent at the
        same time, and that they are sent one after the other.
        """
        if workers == 1 or not any(self.sizes):
            return Cost()
        total, widest, narrowest = sum(self.sizes), max(self.sizes), min(self.sizes)
        one_way = max(total - narrowest, (workers - 1) * widest)
        both_ways = total + (workers - 2) * widest  # bytes sent and received by the worker j with the largest sizes[j]
        return Cost(1, workers - 2, both_ways if workers == 2 else (one_way + both_ways) / 2)


@dataclass(frozen=True)
class Broadcast(Collective):
    """A broadcast of `payload` bytes from rank 0."""

    payload: int

    def wire(self, rank: int, workers: int) -> Bytes:
        return star_broadcast(self.payload, rank, workers)

    def cost(self, workers: int) -> Cost:
        """Return the critical path of gloo's binomial tree, about log2(W)^2 / 2 sequential messages.

        The root posts all its ceil(log2 W) sends immediately. These sends share the root's link, so the first child
        receives the message as late as the last child. Each child then sends to its own children in the same way.
        """
        depth = (workers - 1).bit_length() if self.payload else 0
        children = [sum((1 << i) - 1 + (1 << j) < workers for j in range(i, depth)) for i in range(depth)]
        levels = sum(n > 0 for n in children)
        return Cost(levels, sum(children) - levels, sum(children) * self.payload)


@lru_cache(maxsize=4096)
def message_bytes(compressor: Compressor, d: int, itemsize: int) -> int:
    return round(compressor.message_bytes(d, itemsize)) if d else 0
