"""Error feedback on one slice of the parameters: lines 10 and 12 of Algorithm 1, once for the optimizer and the hooks.

An `ErrorFeedback` owns a slice's memory and the aggregator that averages what is sent of it. A `Round` of it is one
exchange, and a transaction: after `correct`, `exchange` and `absorb`, `settle` commits it or rolls it back as a whole.
Line 11, between exchange and absorb, is the caller's: some callers move x, others fill gradients.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Aggregator, Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, identify
from packsaddle.feedback.compression import Compression
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.slices import Slice
from packsaddle.numerics.seeds import mix


class ErrorFeedback:
    """This worker's e^(i) on a slice, float[n], the first `compressed_d` of it compressed, and how C(v) is averaged.

    `seed` is that of the slice's shared randomness.
    """

    def __init__(
        self, memory: ErrorMemory, channel: Communicator, seed: int, aggregator: Aggregator | None = None
    ) -> None:
        self.memory, self.channel, self.seed = memory, channel, seed
        self._aggregator: Aggregator | None = None
        self.use(aggregator)

    @property
    def aggregator(self) -> Aggregator:
        """The aggregator that averages what is sent."""
        assert self._aggregator is not None, "no compressor has been chosen yet"
        return self._aggregator

    def use(self, aggregator: Aggregator | None) -> None:
        """Switch to another aggregator. The residual of the old one is added to the memory, so no update is lost."""
        if self._aggregator is not None:
            self.memory.vector.copy_(self._aggregator.add_residual(self.memory.vector, self.channel.group.size))
        self._aggregator = aggregator
        self.held()  # allocates its vectors, as long as the memory

    def round(self, step: int) -> "Round":
        """Begin an exchange."""
        return Round(self, step)

    def held(self) -> dict[str, Tensor]:
        """Return the aggregator's residuals by name, float[n] each; views."""
        return self._aggregator.vectors(self.memory.vector) if self._aggregator is not None else {}

    def pending(self) -> Tensor:
        """Return this worker's share of the unapplied updates, float[n]; may be a view."""
        pending = self.memory.pending()
        if self._aggregator is None:
            return pending
        return self._aggregator.add_residual(pending, self.channel.group.size)

    def reset(self, lost: Tensor | None = None) -> None:
        """Clear e (line 7), or set it to `lost`, float[n], and clear the aggregator's residuals."""
        self.memory.reset(lost)
        if self._aggregator is not None:
            self._aggregator.reset()


class SliceFeedback(ErrorFeedback):
    """Error feedback on a slice of a vector of which `whole` coordinates are compressed in all.

    The compressor may change from round to round, and the aggregator follows it. A slice that is all of the vector uses
    `seed` itself, so that its run is that of `CompressedSGD`; others derive seeds of their own.
    """

    def __init__(self, of: Slice, compression: Compression, channel: Communicator, seed: int, whole: int) -> None:
        super().__init__(
            ErrorMemory(of, spare=True), channel, seed if of.compressed_d == whole else mix(seed, of.places[0].start)
        )
        self.of, self._compression, self._whole = of, compression, whole
        self._compressor: Compressor | None = None  # of the whole vector
        self._by_size: Compressor | None = None  # on this slice, by its size alone

    def changes_for(self, compressor: Compressor) -> bool:
        """Return True if `prepare` would switch to another aggregator for this compressor."""
        return compressor != self._compressor

    def prepare(self, compressor: Compressor, allotted: Compressor | None = None) -> None:
        """Switch to the aggregator of this compressor; the residual of another one is added to the error memory.

        `allotted` is the compressor on this slice, where its budget depends on the other slices.
        """
        if self.changes_for(compressor):
            # Lossless messages are averaged directly: their mean needs no second compression.
            n, spec = self.of.compressed_d, self._compression
            self._by_size = self._restricted(compressor)
            chosen = choose(
                self._by_size,
                "direct" if compressor.lossless else spec.exchange,
                d=n,
                dense=self.of.d - n + 1,
                workers=self.channel.group.size,
                itemsize=self.memory.vector.element_size(),
                back=None if spec.back is None or compressor.lossless else self._restricted(spec.back),
            )
            self.use(chosen.aggregator)
            self._compressor = compressor
        assert self._by_size is not None
        # The budget may change in each step, and the aggregator keeps its residuals.
        self.aggregator.adopt(allotted or self._by_size)

    def _restricted(self, compressor: Compressor) -> Compressor:
        n = self.of.compressed_d
        return compressor.restrict(n, self._whole).for_tensors(self.of.shapes) if n else compressor

    def fold(self) -> None:
        """Move the aggregator's residuals into the error memory, and drop the aggregator."""
        self.use(None)
        self._compressor = None

    def held_state(self) -> dict[str, Any]:
        """Return the aggregator's residuals, state and compressor, tensors and plain types; {} without one."""
        if self._compressor is None:
            return {}
        n = self.of.compressed_d
        copies = {name: vector[:n].clone() for name, vector in self.held().items()}
        return {"compressor": identify(self._compressor), "vectors": copies, "state": self.aggregator.state_dict()}

    def restore(self, held: Mapping[str, Any], compressor: Compressor) -> None:
        """Restore residuals to this compressor's aggregator; those of another one are added to the error memory."""
        if not held:
            return
        self.prepare(compressor)
        mine, n, vector = self.held(), self.of.compressed_d, self.memory.vector
        if held["compressor"] == identify(compressor) and mine.keys() == held["vectors"].keys():
            for name, there in mine.items():
                there[:n].copy_(held["vectors"][name])
            self.aggregator.load_state_dict(held["state"], vector.device)
        else:  # their vectors are owner errors, of the mean
            for there in held["vectors"].values():
                vector[:n].add_(there.to(vector.device), alpha=self.channel.group.size)


class Round:
    """One exchange. As a context manager it commits at the end if `absorb` was reached, and else rolls back."""

    def __init__(self, feedback: ErrorFeedback, step: int) -> None:
        self._memory, self._aggregator = feedback.memory, feedback.aggregator
        self._channel, self._seed, self.step = feedback.channel, feedback.seed, step
        self._held = self._aggregator.snapshot()
        self.taken = False

    def correct(self, update: Update) -> Tensor:
        """Return v = e^(i) + u^(i), float[n] (line 10)."""
        return self._memory.correct(update)

    def exchange(self, v: Tensor, extras: Sequence[Tensor] = ()) -> tuple[Averaged, list[Tensor]]:
        """Average C(v) over workers, v's uncompressed part as it is, and `extras`, float[m] each; collective (line 10).

        Extras are sent in the uncompressed part, without another collective; their means are the second result.
        """
        n = self._memory.compressed_d
        dense = torch.cat([v[n:], *extras]) if any(len(extra) for extra in extras) else v[n:]
        g = self._aggregator.average(self._channel, v[:n], dense, seed=self._seed, step=self.step)
        mean, *others = torch.split(g.dense, [len(v) - n, *(len(extra) for extra in extras)])
        return replace(g, dense=mean), [other.clone() for other in others]

    def absorb(self, g: Averaged, lost: Tensor | None = None) -> None:
        """Keep the residual: e^(i) <- v - C(v) (line 12), plus `lost`, float[n], the part that was not applied."""
        self._memory.absorb(g.own, lost)
        self.taken = True

    def settle(self, *, taken: bool) -> None:
        """Commit the exchange, or roll back."""
        if not taken:
            self._aggregator.restore(self._held)
        self._held = None
        self._memory.settle(taken=taken)

    def __enter__(self) -> "Round":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.settle(taken=self.taken and kind is None)
