"""Comparison of x over workers, at intervals, by fingerprints: x is never sent, so it could drift.

A worker whose memory is faulty, whose processor rounds otherwise or whose script changes its parameters alone would
train another model without a word.

Rates that each worker steps by on its own are compared by a digest of all so far. Learning rates, weight decays and the
noise's r are never sent. Where every worker makes its own part of v = e + u of them, x stays equal when they differ,
and the algorithm is another one without a word: e is in units of the worker's own rate, and the mean of unlike noises
is not xi.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.errors import GuardError
from packsaddle.feedback.contraction import Every
from packsaddle.messages import numbered

OnDrift = Literal["stop", "repair"]
Named = Sequence[tuple[str, Tensor]]


class StepRates:
    """The last step's r, then each parameter group's learning rate and weight decay; and 8 bytes that a difference in
    any step since the start has changed."""

    def __init__(self) -> None:
        self._digest = bytes(8)
        self.last: Sequence[float] = ()

    def add(self, rates: Sequence[float]) -> None:
        """Take note of a step's rates, as many on all workers."""
        packed = struct.pack(f"<{len(rates)}d", *rates)
        self._digest = blake2b(self._digest + packed, digest_size=8).digest()
        self.last = rates

    def clear(self) -> None:
        """Begin anew, where a saved state is loaded."""
        self._digest, self.last = bytes(8), ()

    def digest(self, device: torch.device) -> Tensor:
        """Return the 8 bytes, int64[]."""
        return torch.tensor(int.from_bytes(self._digest, "little", signed=True), device=device)


def first_difference(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Name what differs first in two steps' rates, with both values; "" if nothing does."""
    for i, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        if here != there:
            group, is_decay = divmod(i - 1, 2)
            name = f"{('lr', 'weight_decay')[is_decay]} of parameter group {group}" if i else "noise"
            return f"{name} is {here:.6g}, not {there:.6g}"
    return ""


class DriftError(GuardError):
    """The error where workers' parameters, or the rates and the noise that they step by, are no longer equal.

    >>> import torch
    >>> from packsaddle import Compression, CompressedSGD, DriftError, TopK, simulate
    >>> def work(rank):
    ...     weight = torch.nn.Parameter(torch.ones(64, 64))
    ...     opt = CompressedSGD([weight], 0.1, Compression(TopK(1.0), compare_every=1))
    ...     weight.data += rank
    ...     weight.grad = torch.zeros_like(weight)
    ...     try:
    ...         opt.step()
    ...     except DriftError:
    ...         return "stopped"
    >>> simulate(work, 2)
    ['stopped', 'stopped']
    """


@dataclass(frozen=True)
class Drift:
    """A comparison of the workers' parameters, rates and noise that failed.

    >>> import torch
    >>> from packsaddle import Compression, CompressedSGD, TopK, simulate
    >>> def work(rank):
    ...     weight = torch.nn.Parameter(torch.ones(64, 64))
    ...     opt = CompressedSGD([weight], 0.1, Compression(TopK(1.0), compare_every=1, on_drift="repair"))
    ...     weight.data += rank  # as faulty memory would
    ...     weight.grad = torch.zeros_like(weight)
    ...     opt.step()
    ...     return opt.drifts
    >>> simulate(work, 3)[0]
    [Drift(step=0, name='parameter 0', workers=(1, 2))]
    """

    step: int  # t, after which it was made
    name: str  # the first tensor that differs
    workers: tuple[int, ...]  # that differ in it from rank 0

    def __str__(self) -> str:
        verb = "differs" if len(self.workers) == 1 else "differ"
        return f"after step {self.step}: {numbered('worker', self.workers)} {verb} from worker 0 in {self.name}"


class DriftGuard:
    """Compares workers every `every` steps (0: never), and stops or repairs them as `action` says."""

    def __init__(self, every: int, action: OnDrift, channel: Communicator) -> None:
        self._every = Every(every)
        self._action, self._channel = action, channel
        self.found: list[Drift] = []

    def resume(self, steps: int) -> None:
        """Resume after this number of steps, whose comparisons are done, when a saved state is loaded."""
        self._every.last = steps

    def due(self, step: int) -> bool:
        """Return True if a comparison is due after a step with an exchange, t from 0."""
        return self._channel.group.size > 1 and self._every.due(step)

    def compare(
        self, step: int, vectors: Sequence[Tensor], parts: Callable[[], Named], rates: StepRates | None = None
    ) -> None:
        """Compare vectors that must be equal on all workers; collective. `parts()` returns the tensors in them by name.

        If they differ, raises DriftError on every worker, or broadcasts rank 0's; if `rates` differ, raises DriftError.
        """
        # One gather for all fingerprints. Another rate is no fault of x, and cannot be repaired.
        self._every.done(step)
        prints = [fingerprint(t) for t in vectors]
        apart = self._differing(prints if rates is None else [*prints, rates.digest(prints[0].device)])
        if rates is not None and (others := apart.pop()):
            raise DriftError(self._unlike_rates(step, rates, others, prints[0].device))
        if not any(apart):
            return
        # Tensors are told apart only after a difference, in a second gather.
        named = parts()
        rows = self._differing([fingerprint(tensor) for _, tensor in named])
        first = next(i for i, row in enumerate(rows) if row)
        self.found.append(Drift(step, named[first][0], tuple(rows[first])))
        if self._action == "stop":
            raise DriftError(
                f"{self.found[-1]}; go on from a checkpoint, and find out why: faulty memory, unlike processors, a "
                f"script that changes parameters on one worker?"
            )
        for vector in vectors:
            self._channel.broadcast(vector, "guard")

    def _unlike_rates(self, step: int, rates: StepRates, workers: list[int], device: torch.device) -> str:
        """Return the message that names the rate of the first of these workers that differs; collective."""
        mine = torch.tensor(rates.last, dtype=torch.float64, device=device)
        last = [p["rates"].tolist() for p in self._channel.gather({"rates": mine}, fixed_size=True, purpose="guard")]
        verb = "differs" if len(workers) == 1 else "differ"
        return (
            f"after step {step}: {numbered('worker', workers)} {verb} from worker 0 in learning rates, weight decay or "
            f"noise, which must be the same on all workers at every step: "
            f"{first_difference(last[workers[0]], last[0]) or 'not in this step, but in one since the last comparison'}"
        )

    def _differing(self, prints: Sequence[Tensor]) -> list[list[int]]:
        """Return, for each fingerprint, int64[], the workers whose own is not rank 0's."""
        mine = torch.stack(list(prints))
        gathered = [p["prints"] for p in self._channel.gather({"prints": mine}, fixed_size=True, purpose="guard")]
        differs = torch.stack([prints != gathered[0] for prints in gathered]).T.tolist()
        return [[worker for worker, is_other in enumerate(row) if is_other] for row in differs]


def fingerprint(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits read as integers, modulo 2^64, int64[]; any single change changes it.

    So do all but one in 2^64 of random ones. It is read at the speed of memory: 6 ms for 25 million float32 on a CPU.
    """
    whole = tensor.detach().flatten().view(torch.uint8)
    wide = len(whole) // 8 * 8
    if whole.storage_offset() % 8:  # cannot be read eight bytes at a time
        whole = whole.clone()
    body = whole[:wide].view(torch.int64).sum()
    rest = torch.nn.functional.pad(whole[wide:], (0, wide + 8 - len(whole)))
    return body + rest.view(torch.int64).sum()
