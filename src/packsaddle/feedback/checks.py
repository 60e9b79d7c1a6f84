"""Periodic measurements and checks: the fraction of a vector that compression keeps, and drift between workers."""

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.errors import GuardError
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import Path, Value, attribute
from packsaddle.messages import numbered
from packsaddle.numerics.devices import wide, widened

OnDrift = Literal["stop", "repair"]
Named = Sequence[tuple[str, Tensor]]


class Every:
    """A schedule of a task that is due every `steps` steps, or never if `steps` is 0. The task stays due until `done`
    is called."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.last = 0  # number of steps at the last call of `done`

    def due(self, step: int) -> bool:
        return self.steps > 0 and (step + 1) // self.steps > self.last // self.steps

    def done(self, step: int) -> None:
        self.last = step + 1


class Contraction:
    """Measures the contraction of this worker's compression, mu_t = 1 - ||v - C(v)||^2 / ||v||^2, at step t.

    v is the vector to send and C(v) its compressed form. If the vectors of several sets of parameters are sent in a
    step, they are measured together. Coordinates that this worker averages for all workers in a two-way exchange do not
    count, since it does not send them. Lazy noise (see `sgd.lazy_noise.OutstandingNoise`) is not in v.

    Args:
        every: steps between two measurements; 0 never measures.
        of: the parameters that form v, if they are the same in all steps; the contraction of each tensor is then
            measured too. If None, only mu_t of the whole v is measured.
    """

    def __init__(self, every: int, of: Slice | None = None) -> None:
        self._every, self._slice = Every(every), of
        self.whole: float | None = None  # the contraction at the last measurement; None: not measured
        self.by_tensor: Mapping[str, float] = {}  # contraction of each tensor by name; 1 for a tensor whose v is 0
        # Squared norms, two for each vector v that was measured: first that of v, then that of the residual of v. Each
        # is float64[1], or float64[tensors] with a norm for each tensor.
        self._energies: list[Tensor] = []

    def measure(self, step: int, vector: Tensor, owned: slice) -> None:
        """Record the squared norm of `vector`, float[n]. Call once with a vector to send, v, and then with its residual
        v - C(v). Coordinates in `owned`, which this worker does not send, do not count. No-op if no measurement is
        due."""
        if not self._every.due(step):
            return
        vector = vector.clone()
        vector[owned] = 0
        if self._slice is None:
            norms = torch.linalg.vector_norm(vector, dtype=wide(vector.device)).reshape(1)
        else:
            norms = widened(torch.stack(torch._foreach_norm([v.reshape(-1) for v in self._slice.views(vector)])))
        self._energies.append(norms.square())

    def close(self, step: int, *, apply: bool) -> None:
        """End a step, and compute its contraction, the fraction of the squared norm that compression kept, from the
        norms measured in the step. If the step was rejected (`apply` is False), the norms are discarded."""
        energies, self._energies = self._energies, []
        if not (apply and energies):
            return
        before, after = torch.stack(energies).view(-1, 2, len(energies[0])).sum(0).tolist()
        self.whole = contraction(sum(before), sum(after))
        if self._slice is not None:
            each = zip(self._slice.names, before, after, strict=True)
            self.by_tensor = {name: contraction(b, a) for name, b, a in each}
        self._every.done(step)

    def fields(self, path: Path = ("contraction",)) -> list[Value]:
        whole = attribute((*path, "whole"), self, "whole", float | None)
        tensors = attribute((*path, "by_tensor"), self, "by_tensor", dict[str, float])
        last = attribute((*path, "steps"), self._every, "last", int)
        return [whole, last] if self._slice is None else [whole, tensors, last]


def contraction(before: float, after: float) -> float:
    """Return the contraction 1 - after / before of a compression that sends C(v) for a vector v. Here `before` is
    ||v||^2 and `after` is ||v - C(v)||^2. The contraction is 1 if v is 0."""
    # The result is NaN if `after` is NaN, also if both numbers are NaN.
    return 1.0 - after / before if before != 0 else 1.0


class StepRates:
    """The rates of the last step (noise std, learning rates, weight decays), and an 8-byte hash of all steps' rates."""

    def __init__(self) -> None:
        self._digest = bytes(8)
        self.last: Sequence[float] = ()

    def add(self, rates: Sequence[float]) -> None:
        packed = struct.pack(f"<{len(rates)}d", *rates)
        self._digest = blake2b(self._digest + packed, digest_size=8).digest()
        self.last = rates

    def clear(self) -> None:
        """Clear the last rates and the hash. Call when a saved state is loaded."""
        self._digest, self.last = bytes(8), ()

    def digest(self, device: torch.device) -> Tensor:
        return torch.tensor(int.from_bytes(self._digest, "little", signed=True), device=device)


def first_difference(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Describe the first difference between the rates of two workers, with both values, or return "" if all rates are
    equal."""
    for i, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        if here != there:
            group, is_decay = divmod(i - 1, 2)
            name = f"{('lr', 'weight_decay')[is_decay]} of parameter group {group}" if i else "noise"
            return f"{name} is {here:.6g}, not {there:.6g}"
    return ""


class DriftError(GuardError):
    """Raised if parameters, learning rates, weight decay or noise differ between workers."""


@dataclass(frozen=True)
class Drift:
    """A comparison that found workers' parameters to differ."""

    step: int  # t of the last step before the comparison
    name: str  # the first tensor that differs
    workers: tuple[int, ...]  # ranks whose tensor differs from rank 0's

    def __str__(self) -> str:
        verb = "differs" if len(self.workers) == 1 else "differ"
        return f"after step {self.step}: {numbered('worker', self.workers)} {verb} from worker 0 in {self.name}"


class DriftGuard:
    """Compares the workers' parameters by fingerprints, every `every` steps (0: never).

    If they differ, `action` "stop" raises DriftError, and "repair" broadcasts rank 0's parameters. Possible causes of a
    difference are faulty memory, different rounding, and a script that changes parameters on one worker. Hashes of
    learning rates, weight decays and the noise std are compared too: if these differ, parameters stay equal, but error
    memories are scaled by different rates. `digest` sums fingerprints over the processes of one worker.
    """

    def __init__(
        self, every: int, action: OnDrift, channel: Communicator, digest: Callable[[Tensor], Tensor] = lambda p: p
    ) -> None:
        self._every = Every(every)
        self._action, self._channel, self._digest = action, channel, digest
        self.found: list[Drift] = []

    def resume(self, steps: int) -> None:
        """Restart the schedule after `steps` steps, with no comparison overdue. Call when a saved state is loaded."""
        self._every.last = steps

    def due(self, step: int) -> bool:
        return self._channel.group.size > 1 and self._every.due(step)

    def compare(
        self, step: int, vectors: Sequence[Tensor], parts: Callable[[], Named], rates: StepRates | None = None
    ) -> None:
        """Compare vectors that must be equal on all workers; collective. `parts()`
        returns them as (name, tensor) pairs.

        If the vectors differ, raises DriftError on every worker, or broadcasts rank 0's vectors. If `rates` differ,
        raises DriftError.
        """
        # Compare all fingerprints in one gather. A difference in rates raises an error
        # in any case, since it cannot be repaired.
        self._every.done(step)
        prints = [fingerprint(t) for t in vectors]
        apart = self._differing(prints if rates is None else [*prints, rates.digest(prints[0].device)])
        if rates is not None and (others := apart.pop()):
            mine = torch.tensor(rates.last, dtype=wide(prints[0].device), device=prints[0].device)
            parts_of_all = self._channel.gather({"rates": mine}, fixed_size=True, purpose="guard")
            theirs, here = (parts_of_all[worker]["rates"].tolist() for worker in (others[0], 0))
            verb = "differs" if len(others) == 1 else "differ"
            raise DriftError(
                f"after step {step}: {numbered('worker', others)} {verb} from worker 0 in learning rates, weight decay "
                f"or noise, which must be the same on all workers at every step: "
                f"{first_difference(theirs, here) or 'not in this step, but in one since the last comparison'}"
            )
        if not any(apart):
            return
        # After a difference, a second gather compares single tensors, to name the first that differs.
        named = parts()
        rows = self._differing([fingerprint(tensor) for _, tensor in named])
        first = next(i for i, row in enumerate(rows) if row)
        self.found.append(Drift(step, named[first][0], tuple(rows[first])))
        if self._action == "stop":
            raise DriftError(
                f"{self.found[-1]}. Find the cause before resuming from a checkpoint: faulty memory, different "
                f"processors, or a script that changes parameters on one worker"
            )
        for vector in vectors:
            self._channel.broadcast(vector, "guard")

    def _differing(self, prints: Sequence[Tensor]) -> list[list[int]]:
        """Compare fingerprints, int64[] each, with those of all workers; collective. For each of `prints`, return the
        ranks of the workers whose fingerprint differs from rank 0's."""
        mine = self._digest(torch.stack(list(prints)))
        gathered = [p["prints"] for p in self._channel.gather({"prints": mine}, fixed_size=True, purpose="guard")]
        differs = torch.stack([prints != gathered[0] for prints in gathered]).T.tolist()
        return [[worker for worker, is_other in enumerate(row) if is_other] for row in differs]


def fingerprint(tensor: Tensor) -> Tensor:
    """Return a checksum of a tensor, int64[]: the sum of its 8-byte words, modulo 2^64.

    A change of one element always changes the checksum. Random changes of several elements leave the checksum unchanged
    with probability 2^-64.
    """
    whole = tensor.detach().flatten().contiguous().view(torch.uint8)
    wide = len(whole) // 8 * 8
    # Copy a tensor that is not aligned to 8 bytes, since it cannot be read as 8-byte words.
    if whole.storage_offset() % 8:
        whole = whole.clone()
    body = whole[:wide].view(torch.int64).sum()
    rest = torch.nn.functional.pad(whole[wide:], (0, wide + 8 - len(whole)))
    return body + rest.view(torch.int64).sum()
