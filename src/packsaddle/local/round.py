"""A round: one exchange of the local updates of a fragment (parameters exchanged together).

A round has four calls. `begin` computes v, the vector to send. `exchange` sends v and averages it over the workers; it
is collective, and runs immediately, or in the background during the next steps. `close` reads whether the round is
applied or rejected, and commits or rolls back the error memory. `Fragment.apply_round` applies the mean to the anchor,
the parameters on which all workers last agreed. Workers that join and leave during training (elastic workers) vote
between `exchange` and `close` to commit or to repeat the round.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.comm.devices import use_in_current_stream
from packsaddle.compressors import Compressor
from packsaddle.feedback.report import Report
from packsaddle.feedback.round import Round
from packsaddle.local.agreement import lengthen, squares_of
from packsaddle.local.anchor import PseudoGradient
from packsaddle.local.clipping import factors_of, norm_of
from packsaddle.local.lockstep import PendingCall
from packsaddle.numerics.transfers import read

if TYPE_CHECKING:
    from packsaddle.local.fragment import Fragment


def share_of(weights: Sequence[float], rank: int) -> float:
    """Return the factor W w_i / sum_j w_j for worker i = `rank`, where w are the weights of the W workers. The plain
    mean of updates that are scaled by these factors is the weighted mean of the updates, that of federated averaging
    (McMahan et al. 2017, Algorithm 1)."""
    if len(set(weights)) == 1:
        return 1.0
    return len(weights) * weights[rank] / sum(weights)


@dataclass(frozen=True)
class SavedExchange:
    """A completed exchange, with its outcome, that is not applied yet because of a delay, in the form in which a
    `state_dict` stores it."""

    due: int  # the time of the schedule at which the exchange is applied, in ticks (see `Schedule`)
    applied: bool  # True if the exchange will be applied, False if it was rejected
    invalid: bool  # True if this worker's update was non-finite, or too large to compress
    reports: list[Report]  # each worker's report of its first invalid value, by rank; empty if all values were valid
    start: dict[str, Tensor]  # the parameters at `begin`, by name
    mean: dict[str, Tensor]  # mean update over workers, by parameter; empty if the exchange was rejected
    frozen: list[str]  # names of the parameters that were frozen at `begin` on this worker
    agrees: bool  # True if the same parameters are frozen on all workers
    times: list[int]  # each worker's time of an inner step in nanoseconds, by rank; 0: unknown


@dataclass
class LocalRound:
    """One round of a fragment (parameters exchanged together), from `begin` until it is applied or rejected."""

    part: "Fragment"
    t: int  # index of the round, i.e. the number of applied rounds of the fragment before this one
    due: int  # the tick (see `Schedule`), or with elastic workers the step, after which the round is applied
    exchanged: Round | None  # the exchange and its error memory; None: the round is closed, or from a saved state
    invalid: Tensor  # bool[], True if this worker's update v is non-finite, or too large to compress
    # Factor W w_i / sum_j w_j of this worker's update v in the mean over the W workers, for weights w. If it is 0, the
    # worker receives the mean, but keeps its own update.
    share: float = 1.0
    later: bool = False  # True if the exchange has a delay: `due` is later than the beginning
    flush: Compressor | None = None  # compressor of a flush (an exchange of all pending updates); None: no flush
    frozen: list[str] = field(default_factory=list)  # names of the parameters frozen at `begin` on this worker
    agrees: bool = True  # True if the same parameters are frozen on all workers; their anchor then does not change
    residuals: dict[str, Tensor] = field(default_factory=dict)  # residuals 0 - C(0) of frozen parameters, by name
    # Copies of the parameters at `begin`, one per parameter. When the round is applied, the changes of the parameters
    # relative to these copies are kept. Empty: no changes are kept.
    before: list[Tensor] = field(default_factory=list)
    call: PendingCall = field(default_factory=PendingCall)  # the exchange, which may run in the background
    # The mean update over workers, i.e. the mean of their C(v). It is a vector, float[n], if a delay or an option
    # requires a vector, and otherwise an `Averaged`, which has the messages. None: not averaged yet.
    mean: Averaged | Tensor | None = None
    reports: list[Report] = field(default_factory=list)  # by rank, each worker's first invalid value; empty: all valid
    norm: Tensor | None = None  # norm of this worker's own update in v, float32[1]; None: updates are not clipped
    factors: Tensor | None = None  # clipping factors of all workers' v, float64[W]; None: not clipped
    workers: Sequence[str] = ()  # names of the workers for the log, by rank; empty: the ranks are logged
    applied: bool | None = None  # True: applied; False: rejected; None: not known yet

    @classmethod
    def begin(
        cls,
        part: "Fragment",
        due: int,
        weights: Sequence[float],
        *,
        later: bool = False,
        flush: Compressor | None = None,
    ) -> "LocalRound":
        """Begin a round: compute the vector to send, v = decay e + (start - x) + noise. Here e is the error memory, x
        are the parameters, and `start` is the point at which they continued after the last exchange.

        If v is invalid (non-finite, or too large to compress) on a process of this worker, v is replaced by zeros on
        all of its processes. At frozen parameters v is 0, and their error memory does not change.

        Args:
            part: the fragment (parameters exchanged together). The new round is stored in its field `current`.
            due: the time of the schedule at which the round is applied, in ticks (see `Schedule`).
            weights: the weights of the workers in the mean, by rank. A worker with weight 0 sends zeros, keeps its
                local update, and averages no chunk for the other workers in a two-way exchange.
            later: True if the round is applied at a later step. The changes that the parameters make until then are
                kept.
            flush: a compressor with which v is sent, without noise, in an exchange of all pending updates, after which
                the parameters are those of the anchor; None in other rounds.
        """
        options = part.options
        t, spec = part.rounds, options.compression
        noise = None if flush else options.noise.drawn(seed=options.seed, step=t)
        part.use(flush or spec.at(t), None if all(weights) else [rank for rank, w in enumerate(weights) if w])
        for each in part.trained:
            each.begin_exchange()
        frozen = part.frozen_next
        part.anchor.subtract_owed()
        # Compute v. Copy the parameters if inner steps may change them before the round is applied.
        share = share_of(weights, part.feedback.channel.group.rank)
        kept = [] if share else part.anchor.copy_starts()
        exchanged = part.feedback.round(t)
        exchanged.correct(PseudoGradient(part.anchor, spec.decay, noise, frozen))
        before = [x.clone() for x in part.anchor.tensors()] if later else kept
        r = cls(part, t, due, exchanged, exchanged.invalid, share, later, flush, frozen, before=before)
        part.current = r
        if options.workers.clip is not None:
            r.norm = norm_of(r._of_worker(exchanged.v), part.shards.total)
        return r

    def exchange(self, step: int, norms: Tensor | None = None) -> None:
        """Exchange v, multiplied by this worker's weight `share` and compressed, and set the error memory to the
        residual; collective. A worker with `share` 0 sends zeros, and its error memory does not change.

        This method may run in another thread. `step` is the step under which the ledger records the bytes. If `norms`,
        float32[W], is given, v is clipped (see `factors_of`). Then `norms` has the norm of each worker's v, by rank.
        """
        part, exchanged, options = self.part, self.exchanged, self.part.options
        assert exchanged is not None
        part.feedback.channel.step = step
        if norms is not None and (limit := options.workers.clip) is not None:
            self.factors = factors_of(norms, limit)
        measure = self._squares if self._is_lengthened else None
        g = exchanged.exchange(weight=self.share, clip=self.own_factor, measure=measure)
        if self.share:
            exchanged.absorb()
            # Zeros were sent for the frozen parameters, so their error memory must not change.
            if self.frozen:
                residuals = part.by_name(exchanged.v)
                self.residuals = {name: residuals[name].clone() for name in self.frozen}
                part.feedback.memory.keep([part.names.index(name) for name in self.frozen])
        # Store the mean as one vector if a delay or an option requires a vector. Otherwise the decoded messages are
        # subtracted from the anchor one after the other.
        as_vector = self.later or options.outer is not None or options.averages_senders or options.mean_momentum > 0
        as_vector |= self._is_lengthened
        self.mean = self._vector(g) if as_vector else g
        # Gather the reports of invalid values here if the host waits for collectives anyway. If the main thread
        # gathered them later, in `close`, that collective could overtake another fragment's exchange in the background.
        if self.invalid.device.type == "cpu" or part.feedback.channel.group.stages(self.invalid.device):
            self.gather_reports()

    @property
    def _is_lengthened(self) -> bool:
        """True if this round lengthens the mean update where the workers' updates disagree (see `OuterAgreement`)."""
        return self.part.options.agreement > 0 and self.flush is None

    def _squares(self, sent: Tensor) -> Tensor:
        factor = 1.0 if self.own_factor is None else self.own_factor.to(sent)
        return squares_of(self.part.views(self._of_worker(sent, self.share * factor)), self.share)

    def _of_worker(self, v: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        """Return the part of the vector `v`, float[n], that is this worker's own update.

        In a two-way exchange, at the coordinates that the worker owns, i.e. averages for all workers, v also includes
        decay e. At these coordinates e is the residual of a mean, which belongs to the updates of all workers. So scale
        decay e is subtracted there, where `scale` is the factor by which `v` was scaled.
        """
        part, owned = self.part, self.part.feedback.owned
        if owned.start == owned.stop:
            return v
        v = v.clone()
        v[owned] -= scale * part.options.compression.decay * part.feedback.memory.vector[owned]
        for name in self.frozen:
            part.by_name(v)[name].zero_()
        return v

    def _lengthen(self) -> None:
        """Lengthen the mean update of each tensor whose updates differ between workers, in place (see
        `OuterAgreement`). Call this only if the round is applied."""
        assert self.exchanged is not None
        assert isinstance(self.mean, Tensor)
        part, measured = self.part, self.exchanged.measured
        use_in_current_stream(measured)
        workers = part.feedback.channel.group.size
        lengthen(part.views(self.mean), measured, part.options.agreement, workers, part.shards)

    @property
    def own_factor(self) -> Tensor | None:
        """The factor by which clipping scales this worker's update, float64[], or None if updates are not clipped."""
        return None if self.factors is None else self.factors[self.part.feedback.channel.group.rank]

    def _vector(self, g: Averaged) -> Tensor:
        """Return the mean update over workers, whose terms `g` has, as one vector, float[n]. With exchange="senders",
        each coordinate is averaged only over the workers that sent it."""
        n, total = self.part.compressed_d, g.write_to(self.part.zeros().flat)
        if self.part.options.averages_senders and len(g.mean) > 1:
            counts = torch.zeros_like(total[:n])
            for term in g.mean:
                sent = term.compressor.support_of(term.message, n)
                counts.add_(1.0) if sent is None else counts.index_add_(0, sent, torch.ones_like(counts[: len(sent)]))
            total[:n].mul_(len(g.mean) / counts.clamp_(min=1.0))
        return total

    def gather_reports(self) -> None:
        """Gather the reports of all workers in `reports` if the update or a message of at least one worker is invalid;
        collective. A report names the first invalid parameter or message of its worker."""
        assert self.exchanged is not None
        # `verdict.fraction` is the fraction of workers whose v is invalid, or NaN if a message is invalid.
        if self.exchanged.verdict.fraction != 0 and not self.reports:
            report, where = str(self.exchanged.full_report()), self.invalid.device
            texts = self.part.feedback.channel.gather_text(report, where, "guard")
            self.reports = list(map(Report.read, texts))

    def close(self) -> bool:
        """Wait for the exchange, and commit or roll back the error memory. Returns True if the round is applied, and
        False if it is rejected. Raises the errors of the exchange if it ran in the background. Further calls only
        return the result."""
        part = self.part
        if self.applied is None:
            assert self.exchanged is not None
            self.call.wait()
            self.agrees &= self.call.check()
            if isinstance(self.mean, Tensor):
                use_in_current_stream(self.mean)
            # An invalid message may reach only one process of this worker. So the processes reject the round if one of
            # them does.
            self.applied = not part.shards.any(not self._read(), self.invalid.device)
            self.gather_reports()
            self._exclude_frozen()
            if self.applied and self._is_lengthened:
                self._lengthen()
            with part.anchor.fixed_update([] if self.agrees else self.frozen):
                self.finish(commit=self.applied and self.share > 0)
        return self.applied

    def _read(self) -> bool:
        """Copy the outcome of a completed exchange (`Verdict`) from the device to the host and, if updates are clipped,
        the clipping factors too. Returns True if the round is applied."""
        assert self.exchanged is not None
        verdict = self.exchanged.verdict
        if self.factors is None:
            return verdict.read()
        *numbers, factors = read(*verdict.tensors(), self.factors)
        self.factors = torch.tensor(factors, dtype=self.factors.dtype)
        return verdict.settle(*numbers)

    def _exclude_frozen(self) -> None:
        """Exclude the parameters that are frozen on this worker from a completed exchange.

        If the same parameters are frozen on all workers, their mean update is set to 0, so that the anchor (the
        parameters last agreed on) keeps their values. Otherwise the mean update includes C(0), which this worker has
        sent for the frozen parameters, so the residual 0 - C(0) is added to their error memory.
        """
        part = self.part
        if not self.frozen:
            return
        if not self.agrees and self.exchanged is not None:
            views = part.by_name(self.exchanged.v)
            for name, residual in self.residuals.items():
                views[name].add_(residual)
            return
        if isinstance(self.mean, Tensor):
            mean = part.by_name(self.mean)
            for name in self.frozen:
                mean[name].zero_()

    def finish(self, *, commit: bool) -> None:
        """End the exchange. If `commit` is True, commit the new error memory, and otherwise roll it back."""
        part, exchanged = self.part, self.exchanged
        assert exchanged is not None
        exchanged.close(apply=commit)
        if commit:
            # The vector v, which was sent, included `owed` (see `Anchor.owed`), except for frozen parameters. So clear
            # `owed`.
            part.anchor.clear_owed(self.frozen)
        else:
            for each in part.trained:
                each.cancel_exchange()
        if self.applied and self.factors is not None:
            part.clips.record(self.t, self.factors, self.workers)
        part.contraction.close(self.t, apply=commit)
        self.exchanged = None

    @property
    def leaves_rest(self) -> bool:
        """True if this round is a flush, i.e. an exchange of all pending updates, that has not sent all of the update
        v. After such a flush the parameters are moved to the anchor (on which all workers last agreed), and not to the
        start point."""
        if self.flush is None or not self.share:
            return False
        return not self.flush.lossless or ((factor := self.own_factor) is not None and bool(factor < 1))

    def saved(self) -> SavedExchange:
        """Return this round in the form in which a saved state contains it. Call after `close`."""
        assert self.applied is not None
        start = {place.name: s for place, s in zip(self.part.places, self.before, strict=True)}
        mean = self.part.by_name(self.mean) if self.applied and isinstance(self.mean, Tensor) else {}
        outcome = self.due, self.applied, bool(self.invalid), list(self.reports)
        return SavedExchange(*outcome, start, mean, self.frozen, self.agrees, self.call.times)

    @classmethod
    def loaded(cls, part: "Fragment", saved: SavedExchange) -> "LocalRound":
        """Make a round of the fragment `part` from its saved form. The round counts as closed. Call after the
        fragment's number of rounds is loaded."""
        mean = part.zeros() if saved.applied else None
        for name, view in part.by_name(mean.flat).items() if mean is not None else ():
            view.copy_(saved.mean[name])
        here = part.anchor.tensors()
        before = [saved.start[place.name].to(x, copy=True) for place, x in zip(part.places, here, strict=True)]
        return cls(
            *(part, part.rounds, saved.due, None, torch.tensor(saved.invalid, device=part.anchor.flat.device)),
            frozen=saved.frozen,
            agrees=saved.agrees,
            before=before,
            call=PendingCall(times=saved.times),
            mean=None if mean is None else mean.flat,
            reports=saved.reports,
            applied=saved.applied,
        )
