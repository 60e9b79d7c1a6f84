"""A serial simulation of W workers in one process, which runs a script written for torchrun unchanged.

Each worker is a thread with its own model and optimizer, and only one thread runs at a time: the turn passes from rank
to rank at every collective. So results do not depend on scheduling.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from packsaddle.comm.group import Group, ambient_group

T = TypeVar("T")
_PATIENCE = 5.0  # seconds that an interruption waits for a worker that waits for something else than its turn


class _Aborted(BaseException):
    """Ends a worker's thread because another one failed."""


class _Turns:
    """The worker whose turn it is, and each worker's input to the current collective."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._turn = 0
        self._lock = threading.Lock()
        self._changed = [threading.Condition(self._lock) for _ in range(size)]  # by rank: a turn wakes one thread
        self._table: list[tuple[str, tuple[Tensor, ...]] | None] = [None] * size
        self._result: list[tuple[Tensor, ...]] = []
        self.computed: Sequence[Any] = ()  # for each worker, by one of them
        self._finished = 0
        self.failure: BaseException | None = None

    def wait(self, rank: int) -> None:
        with self._lock:
            self._changed[rank].wait_for(lambda: self._turn == rank or self.failure is not None)
            if self.failure is not None:
                raise _Aborted

    def _pass_on(self, rank: int) -> None:
        with self._lock:
            self._turn = (rank + 1) % self.size
            self._changed[self._turn].notify_all()

    def fail(self, failure: BaseException) -> None:
        with self._lock:
            self.failure = self.failure or failure
            for changed in self._changed:
                changed.notify_all()

    def finish(self, rank: int) -> None:
        """Let this worker leave. Ranks leave in order of rank, unless some wait in a collective without end."""
        if rank != self._finished or any(entry is not None for entry in self._table):
            raise RuntimeError(f"worker {rank} finished while another waits for it in a collective")
        self._finished += 1
        self._pass_on(rank)

    def exchange(self, rank: int, kind: str, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Put copies on the table and return, once all have, what the collective gives (not to be changed)."""
        if self._finished:
            raise RuntimeError(f"worker {rank} calls {kind}, but {self._finished} workers have finished")
        self._table[rank] = (kind, tuple(t.clone() for t in tensors))
        self._pass_on(rank)
        self.wait(rank)
        if rank == 0:  # the first to be woken, after everyone has put something down
            entries = self._clear_table()
            if kind == "all_reduce":
                for (other,) in entries[1:]:
                    entries[0][0].add_(other)
            self._result = entries
        return self._result

    def _clear_table(self) -> list[tuple[Tensor, ...]]:
        entries = [entry for entry in self._table if entry is not None]
        calls = [(kind, *((tuple(t.shape), t.dtype) for t in ts if kind != "all_to_all")) for kind, ts in entries]
        for rank, call in enumerate(calls):
            if call != calls[0]:
                raise RuntimeError(f"workers disagree: worker 0 calls {calls[0]}, worker {rank} calls {call}")
        self._table = [None] * self.size
        return [tensors for _, tensors in entries]


class SimulatedGroup(Group):
    """One worker's end of a simulation."""

    def __init__(self, rank: int, turns: _Turns) -> None:
        self.rank = rank
        self.size = turns.size
        self._turns = turns

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(self._turns.exchange(self.rank, "all_reduce", tensor)[0][0])

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [t.clone() for (t,) in self._turns.exchange(self.rank, "all_gather", tensor)]

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return [ts[self.rank].clone() for ts in self._turns.exchange(self.rank, "all_to_all", *outgoing)]

    def broadcast(self, tensor: Tensor) -> None:
        tensor.copy_(self._turns.exchange(self.rank, "broadcast", tensor)[0][0])

    def computed_at_once(self, tensor: Tensor, work: Callable[[list[Tensor]], Sequence[T]]) -> T:
        """Return this worker's of `work`'s results by rank, of all workers' tensors; rank 0 does the work for all."""
        given = self._turns.exchange(self.rank, "computed_at_once", tensor)
        if self.rank == 0:  # the first to go on
            self._turns.computed = work([t for (t,) in given])
        mine: T = self._turns.computed[self.rank]
        return mine


class FusedGroup(Group):
    """One process that stands for W workers at once: what it holds is the mean of what they would hold.

    That is enough where all that workers exchange is means of what is linear in their gradients: RandomK, Identity and
    whatever else travels by all-reduce. Their batches go through the network as one, and there is one error memory,
    the mean. Results are those of W workers but for rounding, and so are the bytes counted.
    """

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.mul_(self.size)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.size  # arguments, say, in which workers agree

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        raise RuntimeError("a fused simulation has no all-to-all: its workers differ in nothing")

    def broadcast(self, tensor: Tensor) -> None:
        pass


def simulate(worker: Callable[[int], T], workers: int) -> list[T]:
    """Run worker(rank) for each rank of a simulated group of `workers`, and return the results by rank.

    Workers run one at a time, in this process. Inside, `CompressedSGD(..., process_group=None)` uses the simulated
    group. Raises ValueError if `workers` is below 1, RuntimeError if the workers' collectives do not match, and the
    exception of the first worker that failed.

    >>> import torch
    >>> from packsaddle import CompressedSGD, TopK, simulate
    >>> def work(rank):
    ...     weight = torch.nn.Parameter(torch.ones(64, 64))
    ...     opt = CompressedSGD([weight], lr=1.0, compressor=TopK(1.0))
    ...     weight.grad = torch.full_like(weight, rank + 1.0)
    ...     opt.step()
    ...     return round(weight[0, 0].item(), 4)
    >>> simulate(work, 3)
    [-1.0, -1.0, -1.0]
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    turns = _Turns(workers)
    results: list[Any] = [None] * workers

    # After a failure the other workers end at their next collective, by _Aborted.
    def body(rank: int) -> None:
        try:
            turns.wait(rank)
            with ambient_group(SimulatedGroup(rank, turns)):
                results[rank] = worker(rank)
            turns.finish(rank)
        except _Aborted:
            pass
        except BaseException as failure:
            turns.fail(failure)

    # A context for each thread: the group that its worker uses is a context variable.
    contexts = [contextvars.copy_context() for _ in range(workers)]
    threads = [threading.Thread(target=c.run, args=(body, rank), daemon=True) for rank, c in enumerate(contexts)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as interruption:  # Ctrl-C: workers end at their next collective
        turns.fail(interruption)
        for thread in threads:
            if thread.ident is not None:  # it has been started
                thread.join(_PATIENCE)
        raise
    if turns.failure is not None:
        raise turns.failure
    return results
