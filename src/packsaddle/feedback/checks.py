"""Periodic measurements and checks: the contraction of the compression, and drift, i.e. parameters that differ between
workers.
"""

import struct
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from packsaddle.comm.communicator import Communicator
from packsaddle.errors import GuardError
from packsaddle.feedback.slices import Slice
from packsaddle.feedback.state import Path, Value, attribute
from packsaddle.messages import numbered
from packsaddle.numerics.devices import wide, widened

Named = Sequence[tuple[str, Tensor]]


class Every:
    """A schedule of a task that is due once in `steps` steps, or never if `steps` is 0.

    If the task is not done at the step at which it becomes due, it stays due in the following steps until `done` is
    called.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.last = 0  # number of finished steps at the last call of `done`

    def due(self, step: int) -> bool:
        return self.steps > 0 and (step + 1) // self.steps > self.last // self.steps

    def done(self, step: int) -> None:
        self.last = step + 1


class Contraction:
    """Measures the contraction of this worker's compression, mu_t = 1 - ||v - C(v)||^2 / ||v||^2, at step t.

    v is the vector to send and C(v) its compressed form. If a step sends several vectors, one for each set of
    parameters, their squared norms are added up. In a two-way exchange, the coordinates that this worker averages for
    all workers do not count, since it does not send them. Lazy noise (see `sgd.lazy_noise.OutstandingNoise`) is not in
    v.

    Args:
        every: the number of steps between two measurements; 0 never measures.
        of: the parameters that form v, if every step sends the same ones in one vector. The contraction of each tensor
            is then measured too. If None, only mu_t of the whole v is measured.
    """

    def __init__(self, every: int, of: Slice | None = None) -> None:
        self._every, self._slice = Every(every), of
        self.whole: float | None = None  # contraction mu_t at the last measurement; None: nothing was measured yet
        # Contraction of each tensor at the last measurement, by name; 1 for a tensor whose v is 0.
        self.by_tensor: Mapping[str, float] = {}
        # Squared norms of this step: for each vector v that was measured, first that of v, then that of its residual.
        # Each is a float64[1] or, if the argument `of` was given, a float64[tensors] with one squared norm per tensor.
        self._energies: list[Tensor] = []

    def measure(self, step: int, vector: Tensor, owned: slice) -> None:
        """Record the squared norm of `vector`, float[n], if a measurement is due.

        Call twice in an exchange: first with the vector to send, v, and then with its residual v - C(v). Coordinates in
        the range `owned`, which this worker does not send, do not count.
        """
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
        """End a step, and compute its contraction from the squared norms that were recorded in the step.

        If the step was rejected (`apply` is False), the squared norms are discarded. The measurement then stays due.
        """
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
    """Return the contraction 1 - after / before of a compression, which sends C(v) for a vector v.

    `before` is ||v||^2, and `after` is ||v - C(v)||^2. If v is 0, the contraction is 1.
    """
    # The result is NaN if `after` is NaN, also if both numbers are NaN.
    return 1.0 - after / before if before != 0 else 1.0


class StepRates:
    """The rates of the last step, `last`, and an 8-byte hash of the rates of all steps.

    The rates of a step are the standard deviation of the noise, and the learning rate and weight decay of each
    parameter group.
    """

    def __init__(self) -> None:
        self._digest = bytes(8)
        self.last: Sequence[float] = ()

    def add(self, rates: Sequence[float]) -> None:
        packed = struct.pack(f"<{len(rates)}d", *rates)
        self._digest = blake2b(self._digest + packed, digest_size=8).digest()
        self.last = rates

    def clear(self) -> None:
        """Clear `last` and the hash. Call when a saved state is loaded."""
        self._digest, self.last = bytes(8), ()

    def digest(self, device: torch.device) -> Tensor:
        return torch.tensor(int.from_bytes(self._digest, "little", signed=True), device=device)


def first_difference(mine: Sequence[float], theirs: Sequence[float]) -> str:
    """Return a description of the first rate that differs between two workers, such as "noise is 0.1, not 0.2".

    `mine` and `theirs` are the rates of the two workers, in the order of `StepRates`. Returns "" if all rates are
    equal.
    """
    for i, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        if here != there:
            group, is_decay = divmod(i - 1, 2)
            name = f"{('lr', 'weight_decay')[is_decay]} of parameter group {group}" if i else "noise"
            return f"{name} is {here:.6g}, not {there:.6g}"
    return ""


class DriftError(GuardError):
    """Raised if the parameters, learning rates, weight decays or noise of the workers differ."""


class DriftGuard:
    """Compares the workers' parameters by fingerprints, once in `every` steps, or never if `every` is 0.

    Possible causes of a difference are faulty memory, different rounding, and a script that changes parameters on one
    worker. Learning rates, weight decays and the standard deviation of the noise are compared too, by a hash: if these
    differ, parameters would stay equal, but the workers' error memories would be scaled by different rates.

    `digest` is a function that adds up the fingerprints of the processes of one worker.
    """

    def __init__(self, every: int, channel: Communicator, digest: Callable[[Tensor], Tensor] = lambda p: p) -> None:
        self._every = Every(every)
        self._channel, self._digest = channel, digest

    def resume(self, steps: int) -> None:
        """Restart the schedule after `steps` steps. The next comparison is due after the next multiple of `every`
        steps.

        Call when a saved state is loaded.
        """
        self._every.last = steps

    def due(self, step: int) -> bool:
        return self._channel.group.size > 1 and self._every.due(step)

    def compare(
        self, step: int, vectors: Sequence[Tensor], parts: Callable[[], Named], rates: StepRates | None = None
    ) -> None:
        """Compare vectors that must be equal on all workers, and the rates of the steps; collective.

        Args:
            step: index of the last step.
            vectors: the vectors to compare, which contain all parameters.
            parts: returns the tensors in `vectors` as (name, tensor) pairs. It is called only if the vectors differ, to
                find the name of the first tensor that differs.
            rates: the rates of all steps; if None, they are not compared.

        If the vectors or the rates differ, raises DriftError on every worker.
        """
        # Compare the fingerprints of the vectors and the hash of the rates in one gather.
        self._every.done(step)
        prints = [fingerprint(t) for t in vectors]
        apart = self._differing(prints if rates is None else [*prints, rates.digest(prints[0].device)])
        if rates is not None and (others := apart.pop()):
            mine = torch.tensor(rates.last, dtype=wide(prints[0].device), device=prints[0].device)
            parts_of_all = self._channel.gather({"rates": mine}, fixed_size=True, purpose="guard")
            theirs, here = (parts_of_all[worker]["rates"].tolist() for worker in (others[0], 0))
            raise DriftError(
                f"{_difference(step, others)} learning rates, weight decay or noise, which must be the same on all "
                f"workers at every step: "
                f"{first_difference(theirs, here) or 'not in this step, but in one since the last comparison'}"
            )
        if not any(apart):
            return
        # If the vectors differ, compare the fingerprints of single tensors in a second gather, to name the first that
        # differs.
        named = parts()
        rows = self._differing([fingerprint(tensor) for _, tensor in named])
        name, others = next((name, row) for (name, _), row in zip(named, rows, strict=True) if row)
        raise DriftError(
            f"{_difference(step, others)} {name}. Find the cause before resuming from a checkpoint: faulty memory, "
            f"different processors, or a script that changes parameters on one worker"
        )

    def _differing(self, prints: Sequence[Tensor]) -> list[list[int]]:
        """Compare this worker's fingerprints with those of all workers; collective.

        `prints` are the fingerprints, int64[] each. The result has a list for each of them, with the ranks of the
        workers whose fingerprint differs from rank 0's.
        """
        mine = self._digest(torch.stack(list(prints)))
        gathered = [p["prints"] for p in self._channel.gather({"prints": mine}, fixed_size=True, purpose="guard")]
        differs = torch.stack([prints != gathered[0] for prints in gathered]).T.tolist()
        return [[worker for worker, is_other in enumerate(row) if is_other] for row in differs]


def _difference(step: int, others: Sequence[int]) -> str:
    verb = "differs" if len(others) == 1 else "differ"
    return f"after step {step}: {numbered('worker', others)} {verb} from worker 0 in"


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
