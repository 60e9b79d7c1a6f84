"""The rounds of local updates: a fragment's change departs, is exchanged, perhaps during the next steps, and lands.

Read `LocalRounds.after` first, which is what follows each inner step. A round that is not taken is entered in `skips`,
and the fragment's changes are in its next one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.compressors import Compressor, Identity
from packsaddle.feedback.background import Background
from packsaddle.feedback.drift import Drift, DriftGuard
from packsaddle.feedback.escape import Reset
from packsaddle.feedback.guard import THE_MEAN, NonFiniteError, Skip, Skips
from packsaddle.feedback.noise import GaussianNoise
from packsaddle.local.escape import AnchorEscape
from packsaddle.local.fragment import Flight, Fragment
from packsaddle.local.inner import Shards
from packsaddle.local.inner_reset import InnerReset
from packsaddle.local.lockstep import Call, Lockstep
from packsaddle.local.options import LocalOptions
from packsaddle.local.participation import Participation
from packsaddle.numerics.finite import first_bad

_FAILED = " (its optimizer was reset)"  # after the name of a parameter: resets have not helped


class LocalRounds:
    """The rounds of a model's fragments, each of which has its own count t of them.

    `inner` is the optimizer that steps on x, which is reset on a worker whose x is of no use, and `outer` that of the
    anchors. `background` carries out the exchanges of fragments whose rounds have a delay.
    """

    def __init__(
        self,
        fragments: Sequence[Fragment],
        options: LocalOptions,
        channel: Communicator,
        background: Background | None,
        *,
        inner: Optimizer,
        outer: Optimizer | None,
        agree: Shards,
        participation: Participation,
        drift: DriftGuard,
        escape: AnchorEscape | None,
    ) -> None:
        self.fragments, self.inner, self.outer = fragments, inner, outer
        self._options, self._compression, self._participation = options, options.compression, participation
        self._channel, self._background, self._agree = channel, background, agree
        self._noise, self._seed, self._drift, self._escape = options.noise, options.seed, drift, escape
        self._lockstep = Lockstep(channel, fragments[0].anchor.flat.device)
        self.skips = Skips(options.compression.max_skipped, channel.group.rank)
        self.resets: list[Reset] = []  # firings of the escape check
        self._reset = InnerReset(inner, [p for part in fragments for p in part.parameters], agree)

    @property
    def count(self) -> int:
        """Rounds of fragments that have landed and were taken."""
        return sum(part.rounds for part in self.fragments)

    @property
    def drifts(self) -> list[Drift]:
        """The comparisons at which anchors differed."""
        return self._drift.found

    def meet(self) -> None:
        """Take x as it is for where all workers have met."""
        for part in self.fragments:
            part.meet()
        if self._escape is not None:
            self._escape.meet()

    def check_step(self) -> None:
        """Check an inner step if the inner optimizer was reset; collective over this worker's shards."""
        if self._reset.rejected and self._reset.reset_again():
            self._go_back()

    def after(self, step: int) -> None:
        """Do what is due after inner step n, from 1: land exchanges whose delay is over, and begin others."""
        for part in self.fragments:
            if part.flight is not None and part.flight.due == step:
                self.land(part)
        for part in self.fragments:
            if part.is_due(step):
                self._begin(part, step)

    def is_due(self, step: int) -> bool:
        """Tell if a round begins after inner step n."""
        return any(part.is_due(step) for part in self.fragments)

    def next_after(self, step: int) -> int:
        """Return the inner step after n after which the next round begins."""
        return step + min(part.until_due(step) for part in self.fragments)

    def _begin(self, part: Fragment, step: int) -> None:
        """Begin a round; without a delay it ends at once."""
        compressor, noise = self._settings(part.rounds)
        due = step + self._options.overlap.delay
        share = self._participation.share_after(step)
        self._depart("exchanges a round", part, compressor, noise, step, due, share)
        if not self._options.overlap.delay:
            self.land(part)

    def _settings(self, t: int) -> tuple[Compressor, GaussianNoise | None]:
        """Return C and xi of a fragment's round t."""
        return self._compression.at(t), self._noise.drawn(seed=self._seed, step=t)

    def _depart(
        self,
        call: Call,
        part: Fragment,
        compressor: Compressor,
        noise: GaussianNoise | None,
        step: int,
        due: int,
        share: float,
    ) -> None:
        """Make v, and exchange C(share v): now, or in the background if it lands at a later step."""
        later = due > step
        flight = self._start(part, compressor, noise, due, share, later=later)
        dense = later or self.outer is not None
        send = partial(self._send, call, step, part, flight, later=later, dense=dense)
        if self._background is None or not later:
            self.in_turn(send)
        else:
            flight.promise = self._background.promise()
            self._background.submit(send, [(flight.promise, flight.v)])

    def _start(
        self,
        part: Fragment,
        compressor: Compressor,
        noise: GaussianNoise | None,
        due: int,
        share: float,
        *,
        later: bool,
    ) -> Flight:
        """Make v. After a failed reset of the inner optimizer, the name of the parameter is marked for all workers."""
        flight = part.start(compressor, noise, self._options.compression.decay, due, later=later, share=share)
        if self._reset.rejected and not bool(flight.bad):
            self._reset.end(part)
        elif self._reset.failed:
            named = zip(part.places, part.tensors(), strict=True)
            flight.name = (first_bad((place.name, x) for place, x in named) or "another shard") + _FAILED
        return flight

    def _send(self, call: Call, step: int, part: Fragment, flight: Flight, *, later: bool, dense: bool) -> None:
        """Exchange a flight once all workers are found to make this call.

        In a GPU's background stream the host does not wait for the headers: they are checked at the landing.
        """
        if self._channel.group.size > 1:
            headers = self._lockstep.gather(call, step)
            if later and headers.device.type != "cpu":
                flight.headers = headers
            else:
                self._lockstep.check(headers)
        part.send(flight, step - 1, senders=self._options.averages_senders, dense=dense)

    def try_out(self, part: Fragment, step: int, share: float, *, dense: bool) -> float:
        """Exchange a fragment's change, for a round that is not committed yet; return ||v||^2.

        `dense` sends all that is pending, without noise.
        """
        compressor, noise = (Identity(), None) if dense else self._settings(part.rounds)
        flight = self._start(part, compressor, noise, step, share, later=False)
        energy = float(flight.v.double().square().sum())
        part.send(flight, max(0, step - 1), senders=self._options.averages_senders, dense=self.outer is not None)
        part.name_bad(flight)
        return energy

    def in_turn(self, work: Callable[[], object]) -> None:
        """Do what is collective, after all that was begun in the background."""
        if self._background is None:
            work()
            return
        promise = self._background.promise()
        self._background.submit(work, [(promise, torch.zeros(0))])
        promise.future.wait()

    def together(self, call: Call, step: int, work: Callable[[], object]) -> None:
        """Do `work`, which is collective, in turn, once all workers are found to make the same call."""

        def checked() -> None:
            if self._channel.group.size > 1:
                self._lockstep.check(self._lockstep.gather(call, step))
            work()

        self.in_turn(checked)

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for running exchanges; they land when they are due."""
        for part in self.fragments:
            if part.flight is not None:
                self._finish(part)

    def _finish(self, part: Fragment) -> bool:
        """Wait for a fragment's exchange; whether it is taken."""
        flight = part.flight
        assert flight is not None
        if flight.promise is not None:
            flight.promise.future.wait()
            flight.promise = None
        if flight.headers is not None:
            self._lockstep.check(flight.headers)
            flight.headers = None
        return part.finish(flight)

    def land(self, part: Fragment) -> bool:
        """End a round of a fragment; whether it was taken."""
        self._finish(part)
        t, flight = part.rounds, part.land(self.outer, self._options.overlap.blend)
        if not flight.taken:
            self._leave_out(part, t, flight)
            return False
        self.skips.reset_streak()
        if self._drift.due(t) and part is self.fragments[-1]:
            self.together("compares anchors", flight.due - self._options.overlap.delay, partial(self._compare, t))
        if self._escape is not None and (reset := self._escape.run()) is not None:
            self.resets.append(reset)
        return True

    def _leave_out(self, part: Fragment, t: int, flight: Flight) -> None:
        """Enter a round that was not taken."""
        workers = tuple(worker for worker, name in enumerate(flight.names) if name)
        name = flight.names[workers[0]] if workers else THE_MEAN
        if bool(flight.bad):
            self._reset.reset(part)
            self._go_back()
        self.skips.record(Skip(t, workers, f"the local update of {name}" if workers else name))
        self._check_resets(flight.names)
        self.skips.check(self.skips.in_a_row)

    def _check_resets(self, names: Sequence[str]) -> None:
        """Raise NonFiniteError if a name, by worker, is marked: that worker's inner optimizer could not be reset."""
        for worker, name in enumerate(names):
            if name.endswith(_FAILED):
                raise NonFiniteError(
                    f"{name.removesuffix(_FAILED)} on worker {worker} is not finite after a step with finite "
                    f"gradients, and {type(self.inner).__name__} could not be reset: it has non-finite state outside "
                    f"of its state_dict() and of the torch optimizers in its attributes, or a learning rate that "
                    f"overflows. Implement state_dict() and load_state_dict() for all of its state, or lower the "
                    f"learning rate"
                )

    def _go_back(self) -> None:
        """Make x finite in all fragments, since a gradient would spread what is not; collective over the shards."""
        for part in self.fragments:
            if not self._reset.are_finite(p for p in part.parameters if p.requires_grad):
                part.go_back()

    def _compare(self, t: int) -> None:
        """Compare anchors of all fragments, which must be equal on all workers."""

        def named() -> list[tuple[str, Tensor]]:
            return [(f"anchor of {p.name}", view) for f in self.fragments for p, view in f.named(f.anchor.flat)]

        self._drift.compare(t, [part.anchor.flat for part in self.fragments], named)

    def flush(self, step: int) -> bool:
        """Land running exchanges, then have a round of each fragment with C(v) = v, without noise; whether all took."""
        taken = True
        for part in self.fragments:
            if part.flight is not None:
                taken &= self.land(part)
        for part in self.fragments:
            self._depart("calls flush()", part, Identity(), None, step, step, self._participation.share())
            taken &= self.land(part)
        return taken

    def error(self, step: int) -> dict[str, Tensor]:
        """Return the weighted mean over workers of `pending`, by parameter, after inner step n; collective."""
        found: dict[str, Tensor] = {}
        self.wait()
        for part in self.fragments:
            pending = part.unapplied().mul_(self._participation.share())
            self.together("calls error()", step, partial(self._channel.mean, pending, "inspection"))
            found |= {place.name: view for place, view in part.named(pending)}
        return found

    def pending(self) -> dict[str, Tensor]:
        """Return what the anchor has not received of this worker, by parameter."""
        self.wait()
        return {place.name: view for part in self.fragments for place, view in part.named(part.unapplied())}

    def anchor(self) -> dict[str, Tensor]:
        """Return a copy of the anchor, by parameter."""
        return {place.name: v.clone() for part in self.fragments for place, v in part.named(part.anchor.flat)}

    def optional(self) -> dict[str, Optimizer | AnchorEscape | None]:
        """Return the parts with a state of their own that not every run has, by name."""
        return {"outer": self.outer, "escape": self._escape}

    def state_dict(self) -> dict[str, Any]:
        """Return the fragments, running exchanges among them, and all that rounds have left, tensors and plain types.

        Waits for running exchanges.
        """
        self.wait()
        return {
            "fragments": [part.state_dict() for part in self.fragments],
            **{name: None if part is None else part.state_dict() for name, part in self.optional().items()},
            "skips": self.skips.state_dict(),
            "resets": [asdict(reset) for reset in self.resets],
            "drifts": [asdict(drift) for drift in self.drifts],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`, which must fit (see `local_state`)."""
        for part, saved in zip(self.fragments, state["fragments"], strict=True):
            part.load_state_dict(saved, self._compression.at(max(0, saved["rounds"] - 1)))
        for name, stage in self.optional().items():
            if stage is not None:
                stage.load_state_dict(state[name])
        self.skips.load_state_dict(state["skips"])
        self.resets = [Reset(**reset) for reset in state["resets"]]
        self._drift.found = [Drift(**drift) for drift in state["drifts"]]
        self._drift.resume(self.fragments[-1].rounds)
