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
    """The saved state of an aggregator, which averages the workers' messages.

    `compressor` describes the compressor that it used, so that the state is loaded only with the same compressor.
    """

    compressor: dict[str, Any]  # the compressor of the aggregator, as described by `identify`
    state: dict[str, Any]


@dataclass(frozen=True)
class Applied:
    """The outcome of `Target.apply`, which applies a mean update. It is identical on all workers."""

    # True if the parameters or gradients did not overflow, a bool[] or a bool. If False, a target whose `defers` is
    # False is unchanged.
    fits: Tensor | bool = True
    rounding: Tensor | None = None  # rounding error of 16-bit parameters or gradients, float[n]; None: no such error


class Target(Protocol):
    """The parameters or gradients to which a mean update is applied (line 11 of Algorithm 1)."""

    defers: bool  # True if `apply` writes the target before the verdict is known; False if it needs the verdict

    def apply(self, g: Averaged, magnitude: Tensor | float) -> Applied:
        """Apply the mean update g of an exchange to the parameters or gradients.

        `magnitude` is the approximate maximum of the absolute values of g.
        """


class ErrorFeedback:
    """Error feedback of a slice (parameters exchanged together): this worker's error memory, float[n], and the
    aggregator, which averages the workers' messages.

    Args:
        memory: the error memory of the slice. A slice is a set of parameters as one vector.
        channel: the communicator between workers.
        guard: validates the vector to send.
        contraction: measures the contraction of the compression, from the vector to send and its residual.
        seed: seed of all shared randomness. A slice with all compressed coordinates of the model uses it unchanged, as
            `CompressedSGD` does. Every smaller slice derives its own seed from it.
        back: the compressor of the mean, which the exchanges "two-way" and "coordinator" send back to the workers;
            None: see `Compression`.
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
        # The compressor for the vector of all parameters; None: none was set yet.
        self.compressor: Compressor | None = None
        self._choice: Choice | None = None

    @property
    def choice(self) -> Choice:
        assert self._choice is not None, "no compressor has been chosen yet"
        return self._choice

    def sends_no_more(self, one: Compressor, other: Compressor) -> bool:
        """Return True if this slice's messages are predicted to be no larger with compressor `one` than with compressor
        `other`, in bytes.

        `one` is a compressor for the vector of all parameters, and `other` is one for this slice.
        """
        n, itemsize = self.slice.compressed_d, self.memory.vector.element_size()
        return 0 < message_bytes(self._restricted(one), n, itemsize) <= message_bytes(other, n, itemsize)

    def use(self, compressor: Compressor, exchange: str = "direct") -> None:
        """Switch to a compressor for the next exchanges.

        `compressor` is the compressor for the vector of all parameters. A number of coordinates that it sends is scaled
        down to the slice's fraction of this vector. `exchange` is the kind of exchange, such as "two-way".

        No-op if `compressor` is already in use. Raises ValueError if the exchange does not support the compressor.
        """
        if compressor == self.compressor:
            return
        n = self.slice.compressed_d
        back = self._back if exchange in ("two-way", "coordinator") else None
        self._choice = choose(
            self._restricted(compressor),
            exchange,
            d=n,
            dense=self.guard.numbers(self.slice.d - n),
            workers=self.channel.group.size,
            itemsize=self.memory.vector.element_size(),
            back=None if back is None else self._restricted(back),
        )
        self.compressor = compressor

    def _restricted(self, compressor: Compressor) -> Compressor:
        n = self.slice.compressed_d
        restricted = compressor if n == self._whole else compressor.restrict(0, n, self._whole)
        return restricted.for_tensors(self.slice.shapes) if n else compressor

    def drop_aggregator(self) -> None:
        """Remove the compressor and its aggregator, which averages the messages. Call `use` before the next
        exchange."""
        self._choice = self.compressor = None

    @property
    def owned(self) -> slice:
        """The range of coordinates that this worker averages for all workers in a two-way exchange. It is empty in
        other exchanges.

        On these coordinates the error memory also contains the residual of the compressed mean (see `Owners`).
        """
        if self._choice is None:
            return slice(0, 0)
        group = self.channel.group
        return self._choice.aggregator.owned(self.slice.compressed_d, group.size, group.rank)

    def round(self, step: int) -> "Round":
        return Round(self, step)

    def reset(self, rounding: Tensor | None = None) -> None:
        """Reset the aggregator, which averages the messages, and set the error memory to zero, or to `rounding` if it
        is given (line 7 of Algorithm 1).

        `rounding`, float[n], is the rounding error of 16-bit parameters.
        """
        self.memory.reset(rounding)
        if self._choice is not None:
            self._choice.aggregator.reset()

    def aggregator_state(self) -> SavedAggregator | None:
        if self.compressor is None:
            return None
        return SavedAggregator(identify(self.compressor), self.choice.aggregator.state_dict())

    def load_aggregator(self, saved: SavedAggregator) -> None:
        """Restore the state of the aggregator, which averages the messages. Call after `use`.

        If the state was saved with another compressor than the one in use, the aggregator is reset instead.
        """
        assert self.compressor is not None
        fits = saved.compressor == identify(self.compressor)
        self.choice.aggregator.load_state_dict(saved.state if fits else {}, self.memory.vector.device)


class Round:
    """One exchange of a slice (parameters exchanged together), as a transaction that `close` commits or rolls back.

    The module's docstring has the order of the calls.
    """

    v: Tensor  # the vector to send, float[n]; after `absorb` its residual
    invalid: Tensor  # bool[], True if this worker's v was invalid and so was set to zero
    # The report on this worker's v. If v is invalid, the kind is "vector". It is "valid" nevertheless if the guard
    # names no tensors: on a GPU, or if its `unnamed` is None.
    report: Report
    g: Averaged  # the mean update, from `exchange` until `absorb`, which deletes it
    extras: list[Tensor]  # the means over workers of the vectors `extras` that `exchange` was given
    measured: Tensor  # float[m], the means over workers of the numbers that `measure` computed in `exchange`
    verdict: Verdict

    def __init__(self, feedback: ErrorFeedback, step: int) -> None:
        self.step, self.feedback = step, feedback
        self._memory, self._aggregator = feedback.memory, feedback.choice.aggregator
        self._snapshot: Any = self._aggregator.snapshot()
        self.absorbed, self._is_open = False, True
        # The part of the uncompressed coordinates that clipping removed, float[m]; None: nothing was removed.
        self._unsent: Tensor | None = None

    def correct(self, update: Update) -> Tensor:
        """Return the vector to send, v = e + u, float[n], for the error memory e and the update u (line 10 of Algorithm
        1).

        If v is invalid, the result is zeros.
        """
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
        """Average this slice's vector v over workers, and return the means of C(v) and of the uncompressed part of v
        (line 10 of Algorithm 1); collective.

        Args:
            extras: vectors, float[m] each, whose means over workers become `self.extras`. They are sent with the
                uncompressed part, and so need no further collective.
            weight: factor of the sent v. The residual is that of v without this factor.
            clip: float[], factor in [0, 1] of the sent v, or None. The residual also includes the part of v that the
                factor removes.
            measure: function of the vector that this worker sends, i.e. C(v) and the uncompressed part of v, float[n].
                It returns numbers, float[m], whose means over workers become `self.measured`.

        A flag that reports an invalid v is sent with the extras. This method may run in another thread.
        """
        f, n = self.feedback, self._memory.compressed_d
        v = self.v if weight == 1.0 else self.v * weight
        if clip is not None and (clip.device.type != "cpu" or clip < 1):
            v = v * clip
            self._unsent = self.v[n:] * (1 - clip)
        # Send three things as one vector: the uncompressed part of v, the flag that reports an invalid v, and `extras`.
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
        # `g.own` is C(weight * v), and `absorb` needs C(v), so divide by the weight.
        if weight not in (0.0, 1.0):
            g = replace(g, own=tuple(replace(term, weight=term.weight / weight) for term in g.own))
        self.g = replace(g, dense=mean)
        self.verdict = f.guard.verdict(self.g, flag)
        return self.g

    def full_report(self) -> Report:
        """Return this worker's report on its own vector and on the messages that it received.

        After an exchange on a GPU, the host waits for the validation of the messages.
        """
        error = None if self.report else self._invalid.error
        return self.report if error is None else Report.of_message(error)

    def apply(self, target: Target) -> None:
        """Apply the mean update to `target` (line 11 of Algorithm 1), and store the residual in the error memory (line
        12).

        No-op if the exchange was rejected, except if `target.defers`: then the verdict is not known yet, and the target
        is always written.
        """
        if not target.defers and not self.verdict.read():
            return
        done = target.apply(self.g, self.verdict.magnitude)
        if done.fits is not False:
            self.verdict.fits = done.fits
            self.absorb(done.rounding)

    def absorb(self, rounding: Tensor | None = None) -> None:
        """Set the new error memory to the residual v - C(v), float[n], of the vector v that was sent as C(v) (line 12
        of Algorithm 1).

        `rounding`, float[n], is added to the residual. It is the error of rounding the updated parameters or gradients
        to 16 bits, or None if there is none.
        """
        self._memory.absorb(self.g.own, rounding)
        if self._unsent is not None:
            self.v[self._memory.compressed_d :].add_(self._unsent)
        self.feedback.contraction.measure(self.step, self.v, self.feedback.owned)
        self.absorbed = True
        # Free the memory of the messages now, since a hook commits its round later.
        del self.g

    def close(self, *, apply: bool) -> None:
        """End the exchange.

        If `apply` is True, the new error memory is committed. Otherwise the error memory and the state of the
        aggregator, which averaged the messages, are rolled back. No-op if the exchange has already ended.
        """
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
