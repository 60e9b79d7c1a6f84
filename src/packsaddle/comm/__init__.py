"""Communication between workers: groups, launching, failures, byte counts, and averaging compressed vectors.

Start with `group` (the four collectives, and how `resolve` selects a group), then `communicator` (the same collectives,
with byte counts recorded in a `ledger`) and `aggregators` (one class for each method of averaging compressed vectors;
`select_aggregator` chooses one). Outside this package, only `hooks.ddp` imports torch.distributed.
"""

from packsaddle.comm.aggregators import Aggregator
from packsaddle.comm.communicator import Communicator, ring_all_gather, ring_all_reduce
from packsaddle.comm.cost_model import AllToAll, Broadcast, Collective, RingAllGather, RingAllReduce
from packsaddle.comm.failures import PeerLostError, TerminatedError, WorkerFailedError
from packsaddle.comm.group import Group, Solo, resolve
from packsaddle.comm.launching import launch, preload_workers, process_group
from packsaddle.comm.ledger import Bytes, Ledger, Span
from packsaddle.comm.managed import ManagedGroup, connect
from packsaddle.comm.select_aggregator import choose
from packsaddle.comm.simulation import simulate

__all__ = [
    "Aggregator",
    "AllToAll",
    "Broadcast",
    "Bytes",
    "Collective",
    "Communicator",
    "Group",
    "Ledger",
    "ManagedGroup",
    "PeerLostError",
    "RingAllGather",
    "RingAllReduce",
    "Solo",
    "Span",
    "TerminatedError",
    "WorkerFailedError",
    "choose",
    "connect",
    "launch",
    "preload_workers",
    "process_group",
    "resolve",
    "ring_all_gather",
    "ring_all_reduce",
    "simulate",
]
