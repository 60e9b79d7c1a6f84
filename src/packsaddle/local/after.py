"""Reactions to the end of a round of local updates, whether the round was applied or rejected.

They are called in a fixed order, each with the `LocalRound` that has ended. To add a reaction, write a class, here or
in a new file, and add it to the list in `Reactions`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.feedback.checks import DriftGuard
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.state import Value, Vector
from packsaddle.local.fragment import Fragment
from packsaddle.local.inner import Shards
from packsaddle.local.lockstep import Lockstep
from packsaddle.local.moments import MeanMomentum
from packsaddle.local.options import LocalOptions
from packsaddle.local.outcomes import Outcomes
from packsaddle.local.round import LocalRound

After = Callable[[LocalRound], None]


class CompareAnchors:
    """Compares the workers' anchors (the parameters on which all workers last agreed) with each other; collective. It
    runs after an applied round of the last of the `fragments` (the parts of the model, which are exchanged separately)
    if `drift`, the guard that compares fingerprints, has a comparison due. If the anchors differ, `drift` raises
    DriftError."""

    def __init__(self, drift: DriftGuard, fragments: Sequence[Fragment], lockstep: Lockstep, delay: int) -> None:
        self._drift, self._fragments, self._lockstep, self._delay = drift, fragments, lockstep, delay

    def __call__(self, r: LocalRound) -> None:
        if not (r.applied and r.part is self._fragments[-1] and self._drift.due(r.t)):
            return

        def named() -> list[tuple[str, Tensor]]:
            return [(f"anchor of {p.name}", view) for f in self._fragments for p, view in f.named(f.anchor.flat)]

        anchors = [f.anchor.flat for f in self._fragments]
        compare = partial(self._drift.compare, r.t, anchors, named)
        self._lockstep.run("compares anchors", r.due - self._delay, compare)


class EscapeAnchor:
    """Runs the saddle escape check (lines 4-8 of Algorithm 1) on the anchor, the parameters on which all workers last
    agreed. `rule` has the settings of the check; its fields `interval` and `every`, which count steps elsewhere, count
    rounds here.

    Raises ValueError if the model is exchanged in several fragments, if exchanges have a delay, or if parameters are
    DTensors.
    """

    def __init__(self, rule: Escape, fragments: Sequence[Fragment], channel: Communicator, seed: int) -> None:
        whole = fragments[0]
        if len(fragments) > 1 or whole.options.overlap.delay or whole.is_sharded:
            raise ValueError("escape needs fragments=1, delay=0 and no DTensors: it compares whole anchors")
        self.resets: list[Reset] = []  # one record for each time that the escape check fired

        def at_anchor() -> float | Tensor:
            whole.anchor.set_parameters(whole.anchor.views)
            return rule.objective()

        rule_at_anchor, clips = replace(rule, objective=at_anchor), whole.options.workers.clip is not None
        self.check = EscapeCheck(rule_at_anchor, whole, whole.anchor.flat, channel, seed, all_differ=clips)

    def __call__(self, r: LocalRound) -> None:
        if not r.applied:
            return
        part = r.part
        try:
            reset, lost = self.check.run(part.rounds, part.feedback.memory.vector)
            if reset is not None:
                part.feedback.reset(lost)
                self.resets.append(reset)
        finally:
            part.anchor.move_to_start()
            if r.leaves_rest:
                part.anchor.move_to_anchor()


class Reactions:
    """The reactions to the end of a round, such as an escape check, called in a fixed order. A reaction that the
    options do not enable is None.

    `outcomes` counts rejected rounds and resets optimizers. It may raise NonFiniteError, after which no other reaction
    runs.
    """

    def __init__(
        self,
        outcomes: Outcomes,
        momentum: MeanMomentum | None,
        drift: DriftGuard,
        compare: CompareAnchors | None,
        escape: EscapeAnchor | None,
    ) -> None:
        self.outcomes, self.drift, self.escape = outcomes, drift, escape
        every: list[After | None] = [outcomes, momentum, compare, escape]
        self._all = [react for react in every if react is not None]
        # One record for each time that the escape check fired. The list is empty if there is no escape check.
        self.resets = list[Reset]() if escape is None else escape.resets

    @classmethod
    def of(
        cls,
        options: LocalOptions,
        optimizers: Sequence[Optimizer],
        fragments: Sequence[Fragment],
        channel: Communicator,
        lockstep: Lockstep | None,
        outer: Optimizer | None,
        shards: Shards,
    ) -> "Reactions":
        """Return the reactions that the options of local updates enable. `lockstep` runs the collectives of a fixed set
        of workers. It is None for workers that join and leave, since they compare their anchors (the parameters last
        agreed on) at the start of a round instead."""
        spec, c, rank = options.compression, options.mean_momentum, channel.group.rank
        outcomes = Outcomes(optimizers, fragments, shards, spec.max_skipped, rank)
        momentum = MeanMomentum(optimizers, c, shards) if c else None
        if momentum is not None and rank == 0:
            momentum.warn_if_advised_against(outer, stacklevel=5)
        drift, compare = DriftGuard(spec.compare_every, channel, shards.digest), None
        if lockstep is not None:
            compare = CompareAnchors(drift, fragments, lockstep, options.overlap.delay)
        rule = options.escape
        escape = None if rule is None else EscapeAnchor(rule, fragments, channel, options.seed)
        return cls(outcomes, momentum, drift, compare, escape)

    def __call__(self, r: LocalRound) -> None:
        for react in self._all:
            react(r)

    def fields(self) -> list[Vector | Value]:
        """Return the fields of the saved state that belong to reactions: the counts of rejected rounds, the state of
        the escape check, and the records of the times that the escape check fired."""
        check = () if self.escape is None else self.escape.check.fields()
        resets = Value(("resets",), list[Reset], lambda: self.resets, self._load_resets)
        return [*check, *self.outcomes.skips.fields(), resets]

    def _load_resets(self, saved: list[Reset]) -> None:
        self.resets[:] = saved
