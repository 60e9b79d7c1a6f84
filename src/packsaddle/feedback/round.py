"""Error feedback as a transaction: lines 10 to 12 of Algorithm 1, once for all fronts.

An `ErrorFeedback` is the error memory of a slice with the aggregator that averages what is sent of it. A `Round` is one
exchange. Its caller supplies an `Update`, what enters, and a `Target`, what the mean is applied to:

    with feedback.round(t) as round:
        round.correct(update)    # line 10: v = e^(i) + u^(i), validated
        round.exchange()         # line 10: the mean over workers of C(v), and the verdict
        round.apply(target)      # line 11: x <- x - mean; line 12: e^(i) <- v - C(v)

It is committed at the end, or rolled back. A target that `defers`, such as gradients in a backward pass, is written
before the verdict is read, and its caller commits the round later. Local updates call `absorb` alone, and apply the
mean to the anchor once the round is committed.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.select_aggregator import Choice, choose
from packsaddle.compressors import Compressor, identify
from packsaddle.feedback.checks import Contraction
from packsaddle.feedback.guard import Guard, Verdict
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.slices import Slice
from packsaddle.numerics.seeds import mix


@dataclass(frozen=True)
class SavedAggregator:
    """An aggregator in a saved state, without its owner errors."""

    compressor: dict[str, Any]  # see `identify`
    state: dict[str, Any]


@dataclass(frozen=True)
class Applied:
    """The outcome of applying a mean, identical on all workers."""

    fits: Tensor | bool = True  # bool[]; False: the target could not hold it, and is unchanged unless it defers
    rounding: Tensor | None = None  # float[n], the part that 16-bit storage could not represent; None: 0


class Target(Protocol):
    """The parameters or gradients to which a mean is applied (line 11)."""

    defers: bool  # applied before the verdict is read

    def apply(self, g: Averaged, magnitude: Tensor | float) -> Applied:
        """Apply the mean g, of about this magnitude."""


class ErrorFeedback:
    """This worker's e^(i) on a slice, float[n], the first `compressed_d` of it compressed, and how C(v) is averaged.

    Args:
        of: the slice.
        memory: its error memory.
        channel: the workers.
        guard: validates v.
        contraction: measures v and its residual.
        seed: seed of all shared randomness. A slice with all compressed coordinates uses it itself, so that its run is
            that of `CompressedSGD`; others derive seeds of their own.
        back: the compressor of the mean on its way back, in exchanges that have one.
        whole: the number of compressed coordinates of all slices. None: this slice has them all.
    """

    def __init__(
        self,
        of: Slice,
        memory: ErrorMemory,
        channel: Communicator,
        guard: Guard,
        contraction: Contraction,
        *,
        seed: int,
        back: Compressor | None = None,
        whole: int | None = None,
    ) -> None:
        self.slice, self.memory, self.channel, self.guard, self.contraction = of, memory, channel, guard, contraction
        self._whole, self._back = of.compressed_d if whole is None else whole, back
        self.seed = seed if of.compressed_d == self._whole else mix(seed, of.start)
        self._compressor: Compressor | None = None  # of the whole vector
        self._by_size: Compressor | None = None  # on this slice, by its size alone
        self._choice: Choice | None = None

    @property
    def choice(self) -> Choice:
        """The way messages are averaged, and the reason."""
        assert self._choice is not None, "no compressor has been chosen yet"
        return self._choice

    def uses(self, compressor: Compressor) -> bool:
        """Return True if `use` would keep the aggregator for this compressor of the whole vector."""
        return compressor == self._compressor

    def use(self, compressor: Compressor, exchange: str = "direct", *, allotted: Compressor | None = None) -> None:
        """Use a compressor from now on. The owner errors of another one are added to the error memory.

        `compressor` is that of the whole vector, and `allotted` that of this slice, where its budget depends on the
        other slices. Raises ValueError if the exchange is impossible for the compressor.
        """
        if not self.uses(compressor):
            n = self.slice.compressed_d
            self._by_size = self._restricted(compressor)
            back = self._back if exchange in ("two-way", "coordinator") else None
            choice = choose(
                self._by_size,
                exchange,
                d=n,
                dense=self.guard.numbers(self.slice.d - n),
                workers=self.channel.group.size,
                itemsize=self.memory.vector.element_size(),
                back=None if back is None else self._restricted(back),
            )
            self._replace(choice, compressor)
        assert self._by_size is not None
        # The budget may change in each step, and the aggregator keeps its owner errors.
        self.choice.aggregator.adopt(allotted or self._by_size)

    def _restricted(self, compressor: Compressor) -> Compressor:
        n = self.slice.compressed_d
        restricted = compressor if n == self._whole else compressor.restrict(n, self._whole)
        return restricted.for_tensors(self.slice.shapes) if n else compressor

    def drop_aggregator(self) -> None:
        """Move the owner errors into the error memory, and forget the compressor."""
        self._replace(None, None)

    def _replace(self, choice: Choice | None, compressor: Compressor | None) -> None:
        if self._choice is not None:
            residual = self._choice.aggregator.add_residual(self.memory.vector, self.channel.group.size)
            self.memory.vector.copy_(residual)
        self._choice, self._compressor = choice, compressor
        self.owner_errors()  # allocates them, as long as the memory

    def round(self, step: int) -> "Round":
        """Begin an exchange."""
        return Round(self, step)

    def owner_errors(self) -> dict[str, Tensor]:
        """Return the errors of the mean that this worker keeps as an owner of chunks, by name, float[n] each; views."""
        return self._choice.aggregator.vectors(self.memory.vector) if self._choice is not None else {}

    def pending(self) -> Tensor:
        """Return this worker's share of the unapplied updates, float[n]; may be a view."""
        pending = self.memory.pending()
        if self._choice is None:
            return pending
        return self._choice.aggregator.add_residual(pending, self.channel.group.size)

    def reset(self, rounding: Tensor | None = None) -> None:
        """Clear e (line 7), or set it to the rounding error of x, float[n], and clear the owner errors."""
        self.memory.reset(rounding)
        if self._choice is not None:
            self._choice.aggregator.reset()

    def owner_errors_by_name(self) -> dict[str, Tensor]:
        """Return the owner errors by compressed parameter; views. {} without owners."""
        errors = self.owner_errors().values()
        return {place.name: view for e in errors for place, view in self.slice.named(e) if not place.dense}

    def aggregator_state(self) -> SavedAggregator | None:
        """Return the aggregator's state and the compressor, None without one."""
        if self._compressor is None:
            return None
        return SavedAggregator(identify(self._compressor), self.choice.aggregator.state_dict())

    def load_aggregator(self, saved: SavedAggregator) -> bool:
        """Restore the aggregator's state; return False, with nothing restored, if it is of another compressor.

        Call after `use`.
        """
        assert self._compressor is not None
        fits = saved.compressor == identify(self._compressor)
        self.choice.aggregator.load_state_dict(saved.state if fits else {}, self.memory.vector.device)
        return fits

    def restore(self, saved: SavedAggregator, errors: Mapping[str, Tensor]) -> None:
        """Restore the aggregator and owner errors by parameter; those of another are added to the error memory.

        Call after `use`.
        """
        mine, memory = self.owner_errors_by_name(), self.slice.by_name(self.memory.vector)
        fits = self.load_aggregator(saved) and mine.keys() == errors.keys()
        for name, error in errors.items():
            if fits:
                mine[name].copy_(error)
            else:  # an error of the mean
                memory[name].add_(error.to(memory[name].device), alpha=self.channel.group.size)


class Round:
    """One exchange of a slice, a transaction; see the module. `commit` or `roll_back` ends it."""

    v: Tensor  # float[n], then its residual
    invalid: Tensor  # bool[], this worker's v is invalid, and was set to zero
    name: str  # the first invalid parameter, on a CPU, where the guard names them; "": none
    g: Averaged  # the mean, until `absorb`
    extras: list[Tensor]  # the means of the extras
    verdict: Verdict

    def __init__(self, feedback: ErrorFeedback, step: int) -> None:
        self.step, self.feedback, self._memory = step, feedback, feedback.memory
        self._aggregator = feedback.choice.aggregator
        self._snapshot: Any = self._aggregator.snapshot()
        self.absorbed = False
        self._is_open = True

    def correct(self, update: Update) -> Tensor:
        """Make and return v = e^(i) + u^(i), float[n] (line 10); zeros if it is invalid, unless it is the gradients."""
        f = self.feedback
        self.v = v = self._memory.correct(update)
        self.invalid, self.name = f.guard.validate(v, update, f.slice, blank=not self._memory.in_gradients)
        f.contraction.measure(self.step, v)
        return v

    def exchange(self, extras: Sequence[Tensor] = (), *, weight: float = 1.0) -> Averaged:
        """Average C(v) over workers, v's uncompressed part as it is, and `extras`, float[m] each; collective (line 10).

        Extras and the guard's flag are sent in the uncompressed part, without another collective. With a `weight`,
        weight v is sent; the residual stays that of v. May run in another thread than the other calls.
        """
        f, n = self.feedback, self._memory.compressed_d
        v = self.v if weight == 1.0 else self.v * weight
        # The uncompressed part, the flag, the extras.
        dense = v[n:]
        extras = [f.guard.flag(dense, self.invalid), *extras]
        sent = torch.cat([dense, *extras]) if any(len(extra) for extra in extras) else dense
        g = self._aggregator.average(f.channel, v[:n], sent, seed=f.seed, step=self.step)
        mean, flag, *others = torch.split(g.dense, [len(v) - n, *(len(extra) for extra in extras)])
        self.extras = [other.clone() for other in others]
        # This worker's own terms are of weight v.
        if weight not in (0.0, 1.0):
            g = replace(g, own=tuple(replace(term, weight=term.weight / weight) for term in g.own))
        self.g = replace(g, dense=mean)
        self.verdict = f.guard.verdict(self.g, flag)
        return self.g

    def apply(self, target: Target, keep: Collection[int] = ()) -> None:
        """Apply the mean to the target (line 11), and absorb the residual, unless the exchange is rejected.

        e stays as it was on the parameters with the indices `keep`.
        """
        if not target.defers and not self.verdict.read():
            return
        assert self._memory.is_deferrable or not target.defers
        done = target.apply(self.g, self.verdict.magnitude)
        if done.fits is not False:
            self.verdict.fits = done.fits
            self.absorb(done.rounding, keep)

    def absorb(self, rounding: Tensor | None = None, keep: Collection[int] = ()) -> None:
        """Set e^(i) to v - C(v), uncommitted (line 12), plus the rounding error of the target, float[n]."""
        self._memory.absorb(self.g.own, rounding)
        self.feedback.contraction.measure(self.step, self.v)
        if keep:
            self._memory.keep(keep)
        self.absorbed = True
        del self.g  # the messages of all workers, while a hook's round waits for its commit

    def commit(self) -> None:
        """Commit the error memory. No-op if the round has ended."""
        self._close(apply=True)

    def roll_back(self) -> None:
        """Roll back the error memory and the aggregator. No-op if the round has ended."""
        self._close(apply=False)

    def _close(self, *, apply: bool) -> None:
        if self._is_open:
            self._is_open = False
            if not apply:
                self._aggregator.restore(self._snapshot)
            self._snapshot = None
            self._memory.close(apply=apply)

    def __enter__(self) -> "Round":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        apply = self.absorbed and kind is None
        self._close(apply=apply)
        self.feedback.contraction.close(self.step, apply=apply)
