"""Rounds, the exchanges of local updates, of a fixed set of workers, and the checks after each of them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.feedback.checks import Drift, DriftGuard
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.state import ANY, Value, Vector, attribute
from packsaddle.local.fragment import Fragment
from packsaddle.local.lockstep import Call, Lockstep
from packsaddle.local.options import Elastic, LocalOptions, Outer
from packsaddle.local.outcomes import Outcomes
from packsaddle.local.participation import Participation


class AnchorEscape:
    """Runs a user's `Escape` check (Algorithm 1, lines 4-8) on the anchor, `whole`, after each round.

    The check's interval and `every` count rounds. The user's objective is evaluated with the parameters at the anchor.
    """

    def __init__(self, rule: Escape, whole: Fragment, channel: Communicator, seed: int) -> None:
        self._whole, self._anchor, self._objective = whole, whole.anchor, rule.objective
        rule = replace(rule, objective=self._at_anchor)
        self._check = EscapeCheck(rule, self._anchor.flat, whole.compressed_d, channel, seed)
        self.begin = self._check.begin  # starts the first check interval at the current anchor

    def _at_anchor(self) -> float | Tensor:
        self._anchor.set_parameters(self._anchor.views)
        return self._objective()

    def run(self) -> Reset | None:
        """Run the check after a round, then set the parameters to their start point; return its firing, or None."""
        try:
            reset, lost = self._check.run(self._whole.rounds, self._whole.feedback.pending())
            if reset is not None:
                self._whole.feedback.reset(lost)
            return reset
        finally:
            self._anchor.move_to_start()

    def fields(self) -> list[Vector | Value]:
        """Return the saved-state fields: the start point x_t' of the check interval, by parameter, and its step t'."""
        anchor = self._whole.by_name(self._check.anchor)
        shapes = {name: view.shape for name, view in anchor.items()}
        step = attribute(("escape", "step"), self._check, "anchor_step", int)
        return [Vector(("escape", "anchor", ANY), shapes, lambda: anchor), step]


class Rounds:
    """Runs the exchanges (rounds) of all fragments; after each it compares anchors and runs the escape check.

    `lockstep` runs collectives, `participation` has this worker's weight in a round, `outcomes` records applied and
    rejected rounds, and `outer` is the optimizer of the anchor. Raises ValueError for an escape check with more than
    one fragment, or a delay.
    """

    def __init__(
        self,
        options: LocalOptions,
        fragments: Sequence[Fragment],
        channel: Communicator,
        lockstep: Lockstep,
        participation: Participation,
        outcomes: Outcomes,
        outer: Optimizer | None,
    ) -> None:
        self._fragments, self._lockstep, self._participation = fragments, lockstep, participation
        self._outcomes, self._outer, self._delay = outcomes, outer, options.overlap.delay
        spec = options.compression
        compare_every = 0 if isinstance(options.workers, Elastic) else spec.compare_every
        self.drift = DriftGuard(compare_every, spec.on_drift, channel)
        if options.escape and (len(fragments) > 1 or self._delay):
            raise ValueError("escape needs fragments=1, delay=0 and no tensor parallelism: it compares whole anchors")
        where = (fragments[0], channel, options.seed)
        self.escape = AnchorEscape(options.escape, *where) if options.escape else None
        self.resets: list[Reset] = []  # records of the escape check's firings

    @torch.no_grad()
    def set_anchors(self) -> None:
        """Set the anchors to the parameters, and start the escape check there. Call before the first step."""
        for part in self._fragments:
            part.anchor.set_from_parameters()
        if self.escape is not None:
            self.escape.begin()

    def is_due(self, step: int) -> bool:
        """Return True if an exchange begins after inner step n, counted from 1; identical on all workers."""
        return any(part.is_due(step) for part in self._fragments)

    def has_work(self, step: int) -> bool:
        """Return True if an exchange begins or is applied after inner step n; identical on all workers."""
        running = [part.current for part in self._fragments if part.current is not None]
        return self.is_due(step) or any(exchange.due == step for exchange in running)

    def run(self, step: int) -> None:
        """Finish the exchanges whose delay ends after inner step n, then begin those that are due; collective."""
        for part in self._fragments:
            if part.current is not None and part.current.due == step:
                self._finish(part)
        for part in self._fragments:
            if part.is_due(step):
                self._begin("exchanges a round", part, step, self._participation.share_after(step), delay=self._delay)

    def flush(self, step: int) -> bool:
        """Finish all exchanges, then exchange all pending updates uncompressed; collective. Return True if applied."""
        applied = [self._finish(part) for part in self._fragments if part.current is not None]
        share = self._participation.share()
        for part in self._fragments:
            applied.append(self._begin("calls flush()", part, step, share, delay=0, uncompressed=True))
        return all(applied)

    def _begin(
        self, call: Call, part: Fragment, step: int, share: float, *, delay: int, uncompressed: bool = False
    ) -> bool:
        """Begin a round of one fragment; without a delay finish it too. Return False if it is rejected already."""
        p = part.begin(step + delay, share, later=delay > 0, uncompressed=uncompressed)
        self._outcomes.register(part, p)
        as_vector = delay > 0 or self._outer is not None
        exchange = partial(part.exchange, p, step - 1, as_vector=as_vector)
        if delay:
            assert p.round is not None
            p.wait = self._lockstep.start(call, step, exchange, p.round.v, p.norm)
            return True
        self._lockstep.run(call, step, exchange, p.norm)
        return self._finish(part)

    def _finish(self, part: Fragment) -> bool:
        """Finish the current exchange of one fragment: apply and record it. Return False if it is rejected."""
        t, p = part.rounds, part.apply_exchange(self._outer)
        if not self._outcomes.record(part, t, p):
            return False
        if self.drift.due(t) and part is self._fragments[-1]:  # the anchors must be equal on all workers

            def named() -> list[tuple[str, Tensor]]:
                return [(f"anchor of {p.name}", view) for f in self._fragments for p, view in f.named(f.anchor.flat)]

            anchors = [f.anchor.flat for f in self._fragments]
            self._lockstep.run("compares anchors", p.due - self._delay, partial(self.drift.compare, t, anchors, named))
        if self.escape is not None and (reset := self.escape.run()) is not None:
            self.resets.append(reset)
        return True

    def fields(self) -> list[Vector | Value]:
        """Return the saved-state fields of the rounds. Call without running exchanges; call `resume` after loading."""
        return [
            *(field for i, part in enumerate(self._fragments) for field in part.fields(("fragments", i))),
            *(() if self.escape is None else self.escape.fields()),
            *self._outcomes.skips.fields(),
            attribute(("resets",), self, "resets", list[Reset]),
            attribute(("drifts",), self.drift, "found", list[Drift]),
        ]

    def resume(self, saved: Sequence[Mapping[str, Any]]) -> None:
        """Restore the fragments' aggregators and residuals from saved states. Call after the fields are loaded."""
        for part, state in zip(self._fragments, saved, strict=True):
            part.resume(state)
        self.drift.resume(self._fragments[-1].rounds)


def outer_optimizer(make: Outer, fragments: Iterable[Fragment], names: Iterable[str]) -> Optimizer:
    """Call `make` with the anchor's tensors, in the order of `names`; return the outer optimizer that it makes.

    Raises TypeError if `make` returns no torch optimizer.
    """
    leaves = {p.name: leaf for part in fragments for p, leaf in zip(part.places, part.anchor.leaves, strict=True)}
    outer = make([leaves[name] for name in names])
    if not isinstance(outer, Optimizer):
        raise TypeError(f"outer must be a function that returns a torch optimizer, got {type(outer).__name__}")
    return outer
