"""Records of a training by local updates: counts of rounds, clipped updates, resets and bytes."""

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import ring_all_reduce
from packsaddle.comm.ledger import Bytes, Ledger
from packsaddle.comm.sharding import local_part
from packsaddle.compressors import describe
from packsaddle.feedback.escape import Reset
from packsaddle.feedback.guard import Records, Skips
from packsaddle.local.after import Reactions
from packsaddle.local.clipping import Clip
from packsaddle.local.elastic.workers import ElasticWorkers
from packsaddle.local.fixed import FixedWorkers
from packsaddle.local.fragment import Fragment
from packsaddle.local.inner import names_of
from packsaddle.local.options import LocalOptions


class Baseline:
    """The bytes that a process would have sent if the gradients of `parameters` were exchanged by a ring all-reduce in
    each step. If a worker has several `processes`, each of them is counted with an equal part of the gradients."""

    def __init__(self, parameters: Iterable[Tensor], processes: int) -> None:
        self._size = sum(local_part(p).nbytes for p in parameters) // processes
        self._with_others = Bytes()  # saved bytes minus those that `bytes` computes for the same steps; 0 by default

    def bytes(self, steps: int, workers: int) -> Bytes:
        return self._with_others + ring_all_reduce(steps * self._size, workers)

    def load(self, saved: Bytes, steps: int, workers: int) -> None:
        """Restore the `saved` bytes of the first `steps` steps. The number of workers in these steps may have been
        different from `workers`, the current number."""
        self._with_others = Bytes()
        self._with_others = saved - self.bytes(steps, workers)


class LocalRecords(Records):
    """The records of `LocalUpdates`, as properties. Reading a property changes nothing and is not collective."""

    steps: int
    optimizers: Sequence[Optimizer]
    options: LocalOptions
    outer: Optimizer | None
    _fragments: Sequence[Fragment]
    _workers: FixedWorkers | ElasticWorkers
    _reactions: Reactions
    _baseline: Baseline

    def __repr__(self) -> str:
        compressor = describe(self.options.compression.at(self.rounds))
        outer = type(self.outer).__name__ if self.outer else "mean"
        return (
            f"LocalUpdates({names_of(self.optimizers)}, every={self.options.every}, {compressor}, outer={outer}, "
            f"fragments={len(self._fragments)}, workers={self._workers.channel.group.size}, steps={self.steps}, "
            f"rounds={self.rounds})"
        )

    @property
    def _skips(self) -> Skips:  # type: ignore[override]
        return self._reactions.outcomes.skips

    @property
    def ledger(self) -> Ledger:
        """The bytes that this worker sent and received, by round and by purpose, such as "guard" for checks."""
        return self._workers.channel.ledger

    @property
    def rounds(self) -> int:
        """The number of applied exchanges, summed over fragments (parts of the model exchanged together)."""
        return sum(part.rounds for part in self._fragments)

    @property
    def clips(self) -> list[Clip]:
        """A record of each update, of any worker, that exceeded the limit `Workers.clip` and so was scaled down. The
        list has the records since construction, or since a saved state was loaded."""
        return sorted((clip for part in self._fragments for clip in part.clips.found), key=lambda clip: clip.step)

    @property
    def clipped(self) -> int:
        """The number of updates, of all workers, that exceeded the limit `Workers.clip` and so were scaled down. If a
        saved state was loaded, the number includes the updates that were clipped before the state was saved."""
        return sum(part.clips.count for part in self._fragments)

    @property
    def resets(self) -> list[Reset]:
        """A record of each time that the saddle escape check (lines 4-8 of Algorithm 1) fired. It contains the round,
        the reason, the compared losses, and the decision to keep or to roll back the anchor, i.e. the parameters on
        which all workers last agreed."""
        return self._reactions.resets

    @property
    def workers(self) -> int:
        """The number of workers. If workers join and leave, it is the number of workers in the last round."""
        return self._workers.workers

    @property
    def paces(self) -> list[int]:
        """The number of inner steps of each worker in a round, by rank. Each number is `every`, except with
        `Workers(weight="steps")`, where a faster worker makes more steps. If workers join and leave (see `Elastic`),
        the list has one entry: the number of steps that this worker makes from one round to the next."""
        return list(self._workers.paces)

    @property
    def position(self) -> int:
        """The number of inner steps of all workers whose updates are included in the anchor, i.e. in the parameters on
        which all workers last agreed. Workers that have left count too."""
        return self._workers.position(self.steps)

    @property
    def contraction(self) -> float | None:
        """The contraction 1 - ||v - C(v)||^2 / ||v||^2 at the last measurement, where v is this worker's update and C
        the compressor. It is None if there was no measurement (see `Compression.monitor_every`). The value is a mean
        over the measured fragments (parts of the model exchanged together)."""
        found = [part.contraction.whole for part in self._fragments if part.contraction.whole is not None]
        return sum(found) / len(found) if found else None

    @property
    def uncompressed(self) -> Bytes:
        """The bytes that a ring all-reduce of the gradients in each of the steps so far would have sent."""
        return self._baseline.bytes(self.steps, self._workers.channel.group.size)

    @property
    def exchanging(self) -> bool:
        """True if an exchange began after the last inner step, or, with `Workers(weight="steps")`, if that step ended a
        round; True equally often on all workers."""
        return self._workers.exchanging(self.steps)
