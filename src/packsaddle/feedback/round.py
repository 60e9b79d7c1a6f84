"""Error feedback as a transaction: lines 10 to 12 of Algorithm 1, for the optimizer, hooks and local updates.

An `ErrorFeedback` is the error memory e^(i) of a slice (parameters exchanged together) on worker i, with the aggregator
that averages its messages. A `Round` is one exchange. Its caller supplies an `Update`, the input u^(i), and a `Target`,
i.e. the parameters x or gradients to which the mean update is applied. The verdict is the decision to apply or to
reject the exchange, identical on all workers:

    with feedback.round(t) as round:
        round.correct(update)    # line 10: v = e^(i) + u^(i), validated
        round.exchange()         # line 10: the mean over workers of C(v), and the verdict
        round.apply(target)      # line 11: x <- x - mean; line 12: e^(i) <- v - C(v)

On exit the round is committed or rolled back. A target that `defers`, such as gradients in a backward pass, is written
before the verdict is read, and its caller commits the round later. Local updates call `absorb` instead of `apply`, and
apply the mean to the anchor (the parameters on which all workers last agreed) after the commit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged, Term
from packsaddle.comm.communicator import Communicator
from packsaddle.comm.cost_model import message_bytes
from packsaddle.comm.select_aggregator import Choice, choose
from packsaddle.compressors import Compressor, identify
from packsaddle.feedback.checks import Contraction
from packsaddle.feedback.guard import Guard, Verdict
from packsaddle.feedback.memory import ErrorMemory, Update
from packsaddle.feedback.report import Report
from packsaddle.numerics.seeds import mix


@dataclass(frozen=True)
class SavedAggregator:
    """The saved state of an aggregator, which averages the workers' messages, and the compressor that it used."""

    compressor: dict[str, Any]  # the aggregator's compressor, as described by `identify`
    state: dict[str, Any]


@dataclass(frozen=True)
class Applied:
    """The outcome of applying a mean update, identical on all workers."""

    # True if the result does not overflow, bool[]. If False, a target that does not defer is unchanged.
    fits: Tensor | bool = True
    rounding: Tensor | None = None  # the rounding error of 16-bit storage, float[n]; None: 0


class Target(Protocol):
    """The parameters or gradients to which a mean update is applied (line 11 of Algorithm 1)."""

    defers: bool  # True if the target is written before it is known whether the exchange is applied or rejected

    def apply(self, g: Averaged, magnitude: Tensor | float) -> Applied:
        """Apply the mean update g of an exchange. `magnitude` is the approximate maximum of its absolute values."""


class ErrorFeedback:
    """Error feedback of a slice (parameters exchanged together): this worker's error memory, float[n], and the
    aggregator, which averages the workers' messages.

    Args:
        memory: the error memory of the slice. A slice is a set of parameters as one vector.
        channel: the communicator between workers.
        guard: validates the vector to send.
        contraction: measures, from that vector and its residual, the fraction that compression keeps.
        seed: seed of all shared randomness. A slice with all compressed coordinates uses it unchanged, so that its
            randomness is that of `CompressedSGD`; other slices derive their own seeds from it.
        back: the compressor of the mean that is sent back, in exchanges that send one back.
        whole: the number of compressed coordinates of all slices, or None if this slice contains all of them.
    """

    def __init__(
        self,
        memory: ErrorMemory,
        channel: Communicator,
        guard: Guard,
        contraction: Contraction,
        *,
        seed: int,
        back: Compressor | None = None,
        whole: int | None = None,
    ) -> None:
        self.slice = of = memory.slice
        self.memory, self.channel, self.guard, self.contraction = memory, channel, guard, contraction
        self._whole, self._back = of.compressed_d if whole is None else whole, back
        self.seed = seed if of.compressed_d == self._whole else mix(seed, of.start)
        self.compressor: Compressor | None = None  # the compressor of the vector of all parameters
        self._by_size: Compressor | None = None  # the compressor of this slice, with a budget proportional to its size
        self._choice: Choice | None = None

    @property
    def choice(self) -> Choice:
        assert self._choice is not None, "no compressor has been chosen yet"
        return self._choice

    def sends_no_more(self, one: Compressor, other: Compressor) -> bool:
        """Return True if the messages of these parameters are predicted to be no larger with compressor `one` than with
        compressor `other`, in bytes."""
        n, itemsize = self.slice.compressed_d, self.memory.vector.element_size()
        return 0 < message_bytes(self._restricted(one), n, itemsize) <= message_bytes(other, n, itemsize)

    def use(self, compressor: Compressor, exchange: str = "direct", *, allotted: Compressor | None = None) -> None:
        """Switch to a compressor. If it is already in use, only the number of coordinates to send may change.

        `compressor` is for the vector of all parameters. `allotted`, if given, is the compressor of this slice, i.e. of
        the parameters exchanged together here. Its number of coordinates to send depends on the other slices. Raises
        ValueError if the exchange does not support the compressor.
        """
        if compressor != self.compressor:
            n, by_size = self.slice.compressed_d, self._restricted(compressor)
            back = self._back if exchange in ("two-way", "coordinator") else None
            choice = choose(
                by_size,
                exchange,
                d=n,
                dense=self.guard.numbers(self.slice.d - n),
                workers=self.channel.group.size,
                itemsize=self.memory.vector.element_size(),
                back=None if back is None else self._restricted(back),
            )
            self._choice, self.compressor, self._by_size = choice, compressor, by_size
        assert self._by_size is not None
        # The number of coordinates to send may change in each step.
        self.choice.aggregator.adopt(allotted or self._by_size)

    def _restricted(self, compressor: Compressor) -> Compressor:
        n = self.slice.compressed_d
        restricted = compressor if n == self._whole else compressor.restrict(0, n, self._whole)
        return restricted.for_tensors(self.slice.shapes) if n else compressor

    def drop_aggregator(self) -> None:
        """Remove the compressor, and the aggregator that averages its messages. Call `use` before the next exchange."""
        self._choice = self.compressor = None

    @property
    def owned(self) -> slice:
        """The coordinates that this worker averages for all workers in a two-way exchange. There its error memory also
        contains the residual of the compressed mean (see `Owners`)."""
        if self._choice is None:
            return slice(0, 0)
        group = self.channel.group
        return self._choice.aggregator.owned(self.slice.compressed_d, group.size, group.rank)

    def round(self, step: int) -> "Round":
        return Round(self, step)

    def reset(self, rounding: Tensor | None = None) -> None:
        """Clear the error memory (line 7 of Algorithm 1), and reset the aggregator, which averages the messages. If
        `rounding`, float[n], is given, i.e. the rounding error of the parameters, the error memory becomes `rounding`
        instead."""
        self.memory.reset(rounding)
        if self._choice is not None:
            self._choice.aggregator.reset()

    def aggregator_state(self) -> SavedAggregator | None:
        if self.compressor is None:
            return None
        return SavedAggregator(identify(self.compressor), self.choice.aggregator.state_dict())

    def load_aggregator(self, saved: SavedAggregator) -> None:
        """Restore the state of the aggregator, which averages the messages. If it was saved with a compressor that
        differs from the current one, reset it instead. Call after `use`."""
        assert self.compressor is not None
        fits = saved.compressor == identify(self.compressor)
        self.choice.aggregator.load_state_dict(saved.state if fits else {}, self.memory.vector.device)


class Round:
    """One exchange of a slice (parameters exchanged together), as a transaction that `close` commits or rolls back. The
    order of the calls is in the module's docstring."""

    v: Tensor  # the vector to send, float[n], or after `absorb` its residual
    invalid: Tensor  # bool[], True if this worker's v was invalid and so was set to zero
    # The report on this worker's v. For an invalid v its kind is "vector", or "valid" if the guard does not name the
    # invalid tensor: on a GPU, or if it was made without `unnamed`.
    report: Report
    g: Averaged  # the mean update; deleted by `absorb`
    extras: list[Tensor]  # the means over workers of the vectors `extras` that `exchange` was given
    measured: Tensor  # float[m], the means over workers of the numbers that `measure` computed in `exchange`
    verdict: Verdict

    def __init__(self, feedback: ErrorFeedback, step: int) -> None:
        self.step, self.feedback = step, feedback
        self._memory, self._aggregator = feedback.memory, feedback.choice.aggregator
        self._snapshot: Any = self._aggregator.snapshot()
        self.absorbed, self._is_open = False, True
        self._unsent: Tensor | None = None  # the part of the uncompressed coordinates that clipping removed; None: 0

    def correct(self, update: Update) -> Tensor:
        """Return the vector to send (line 10 of Algorithm 1): v = e + u, float[n], for the error memory e and the
        update u. If v is invalid, return zeros."""
        f = self.feedback
        self.v = v = self._memory.correct(update)
        self.invalid, self.report = f.guard.validate(v, update, f.slice)
        f.contraction.measure(self.step, v, f.owned)
        return v

    def exchange(
        self,
        extras: Sequence[Tensor] = (),
        *,
        weight: float = 1.0,
        clip: Tensor | None = None,
        measure: Callable[[Tensor], Tensor] | None = None,
    ) -> Averaged:
        """Average C(v) and v's uncompressed part over workers, and return the means (line 10 of Algorithm 1);
        collective.

        `extras`, float[m] each, and a flag that reports an invalid v are averaged with the uncompressed part, without
        another collective. `weight` scales the sent v, but not its residual. `clip`, float[] in [0, 1], scales the sent
        v, and the removed part is added to the residual. `measure` is a function of the vector that this worker sends,
        float[n], which consists of C(v) and the uncompressed part of v. It returns numbers, float[m], which are
        averaged like `extras`. This method may run in another thread.
        """
        f, n = self.feedback, self._memory.compressed_d
        v = self.v if weight == 1.0 else self.v * weight
        if clip is not None and (clip.device.type != "cpu" or clip < 1):
            v = v * clip
            self._unsent = self.v[n:] * (1 - clip)
        # Send the uncompressed part, the flag and the extras as one vector.
        dense = v[n:]
        flag, at = f.guard.flag(dense, self.invalid)
        extras = [flag, *extras]
        sent = torch.cat([dense, *extras]) if any(len(extra) for extra in extras) else dense

        def with_measured(own: tuple[Term, ...]) -> Tensor:
            assert measure is not None
            whole = torch.cat([torch.zeros_like(v[:n]), dense])
            for term in own:
                term.add_to(whole, 1.0)
            return torch.cat([sent, measure(whole)])

        to_send = sent if measure is None else with_measured
        g = self._aggregator.average(f.channel, v[:n], to_send, seed=f.seed, step=self.step, flag=at)
        self._invalid = g.invalid
        lengths = [len(v) - n, *(len(extra) for extra in extras)]
        mean, flag, *others = torch.split(g.dense, [*lengths, len(g.dense) - sum(lengths)])
        *self.extras, self.measured = [other.clone() for other in others]
        # `g.own` is C(weight * v), and `absorb` needs C(v).
        if weight not in (0.0, 1.0):
            g = replace(g, own=tuple(replace(term, weight=term.weight / weight) for term in g.own))
        self.g = replace(g, dense=mean)
        self.verdict = f.guard.verdict(self.g, flag)
        return self.g

    def full_report(self) -> Report:
        """Return this worker's report of its vector and of the messages that it received. After an exchange on a GPU,
        the host waits for the checks of the messages."""
        error = None if self.report else self._invalid.error
        return self.report if error is None else Report.of_message(error)

    def apply(self, target: Target) -> None:
        """Apply the mean update to `target`, the parameters or gradients (line 11 of Algorithm 1), and store the
        residual in the error memory. No-op for a rejected exchange, unless the target must be written before it is
        known that the exchange is rejected (`Target.defers`)."""
        if not target.defers and not self.verdict.read():
            return
        assert self._memory.is_deferrable or not target.defers
        done = target.apply(self.g, self.verdict.magnitude)
        if done.fits is not False:
            self.verdict.fits = done.fits
            self.absorb(done.rounding)

    def absorb(self, rounding: Tensor | None = None) -> None:
        """Set the new error memory to the residual v - C(v), float[n], of the vector v that was sent compressed as C(v)
        (line 12 of Algorithm 1). `rounding`, float[n], is added to it: the error of rounding the updated parameters or
        gradients to 16 bits."""
        self._memory.absorb(self.g.own, rounding)
        if self._unsent is not None:
            self.v[self._memory.compressed_d :].add_(self._unsent)
        self.feedback.contraction.measure(self.step, self.v, self.feedback.owned)
        self.absorbed = True
        # Free the messages of all workers now, since a hook commits its round later.
        del self.g

    def close(self, *, apply: bool) -> None:
        """End the exchange. If `apply` is True, commit the new error memory; otherwise roll back the error memory and
        the state of the aggregator, which averaged the messages. No-op if the round was closed before."""
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
        self.close(apply=apply)
        self.feedback.contraction.close(self.step, apply=apply)
