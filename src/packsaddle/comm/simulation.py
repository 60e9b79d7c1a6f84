"""A serial simulation of W workers in one process, for training code written for torchrun.

Each worker is a thread with its own model and optimizer. Only one thread runs at a time, and each collective switches
to the next rank, so results do not depend on scheduling.
"""

import contextvars
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from packsaddle.comm.group import Group, ambient_group

T = TypeVar("T")
_PATIENCE = 5.0  # seconds to wait for each thread to end after an interruption


class _Aborted(BaseException):
    """Raised in a worker's thread to end it after another worker failed."""


class _Turns:
    """Scheduler of the workers' threads: `wait` blocks a thread until its rank may run."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._turn = 0
        self._lock = threading.Lock()
        self._changed = [threading.Condition(self._lock) for _ in range(size)]  # one per rank
        self._table: list[tuple[str, tuple[Tensor, ...]] | None] = [None] * size
        self._result: list[tuple[Tensor, ...]] = []
        self.computed: Sequence[Any] = ()  # results of `computed_at_once`, by rank
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
        """Mark this worker as finished. Raises RuntimeError if another worker waits for it in a collective."""
        if rank != self._finished or any(entry is not None for entry in self._table):
            raise RuntimeError(f"worker {rank} finished while another waits for it in a collective")
        self._finished += 1
        self._pass_on(rank)

    def exchange(self, rank: int, kind: str, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        """Submit copies of `tensors` to the collective `kind`, and wait until all workers have submitted theirs. Return
        the tensors of all workers, by rank; the caller must not modify them. For an all-reduce, rank 0's tensor is the
        sum over workers."""
        if self._finished:
            raise RuntimeError(f"worker {rank} calls {kind}, but {self._finished} workers have finished")
        self._table[rank] = (kind, tuple(t.clone() for t in tensors))
        self._pass_on(rank)
        self.wait(rank)
        if rank == 0:  # rank 0 resumes first, after all workers have submitted tensors
            submitted = [entry for entry in self._table if entry is not None]
            calls = [(k, *((tuple(t.shape), t.dtype) for t in ts if k != "all_to_all")) for k, ts in submitted]
            for other, call in enumerate(calls):
                if call != calls[0]:
                    raise RuntimeError(f"workers disagree: worker 0 calls {calls[0]}, worker {other} calls {call}")
            self._table = [None] * self.size
            entries = [copies for _, copies in submitted]
            if kind == "all_reduce":
                for (copy,) in entries[1:]:
                    entries[0][0].add_(copy)
            self._result = entries
        return self._result


class SimulatedGroup(Group):
    """The group of simulated workers from the view of one worker, whose index is `rank`."""

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
        """Call work(tensors of all workers) once, on rank 0, and return this rank's item of the result; collective."""
        given = self._turns.exchange(self.rank, "computed_at_once", tensor)
        if self.rank == 0:  # rank 0 resumes first
            self._turns.computed = work([t for (t,) in given])
        mine: T = self._turns.computed[self.rank]
        return mine


class FusedGroup(Group):
    """One process that emulates W workers: its tensors are the means of the workers' tensors.

    The emulation is exact, up to rounding, for linear compressors such as RandomK and Identity, with which workers
    exchange only means of vectors that are linear in their gradients. The workers' batches are processed as one batch,
    and there is one error memory, which equals the mean of the workers' error memories. Bytes are counted as for W
    workers.
    """

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.mul_(self.size)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.size  # used only for values that are equal on all workers, such as arguments

    def all_to_all(self, outgoing: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        raise RuntimeError("a fused simulation has no all-to-all: its workers differ in nothing")

    def broadcast(self, tensor: Tensor) -> None:
        pass


def simulate(worker: Callable[[int], T], workers: int) -> list[T]:
    """Run worker(rank) for each rank of a simulated group of `workers`, and return the results by rank.

    Workers run one at a time, in this process. Inside the function `worker`, `CompressedSGD(..., process_group=None)`
    uses the simulated group. Raises ValueError if `workers` is below 1, and RuntimeError if the workers' collectives do
    not match. If a worker fails, its exception is raised here.

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

    # After a failure, _Aborted ends the other workers at their next collective.
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

    # Run each thread in its own context: the group that a worker uses is a context variable.
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
            # `ident` is None if the interruption came before the thread was started.
            if thread.ident is not None:
                thread.join(_PATIENCE)
        raise
    if turns.failure is not None:
        raise turns.failure
    return results
