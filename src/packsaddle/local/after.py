"""Reactions to the end of a round of local updates, whether the round was applied or rejected.

They are called in a fixed order, each with the `Ended` round. To add a reaction, write a class, here or in a new file,
and add it to the list in `Reactions`.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.sharding import Shards, local_part
from packsaddle.feedback.escape import Escape, EscapeCheck, Reset
from packsaddle.feedback.guard import THE_MEAN, Skip, Skips
from packsaddle.feedback.optimizers import parameters_of
from packsaddle.feedback.state import Value, Vector, attribute
from packsaddle.local.fragment import Fragment
from packsaddle.local.moments import MeanMomentum
from packsaddle.local.options import LocalOptions
from packsaddle.local.round import Clip, Ended
from packsaddle.local.watch import stepped_optimizers
from packsaddle.numerics.finite import is_finite

_log = logging.getLogger("packsaddle")
After = Callable[[Ended], None]


class Reactions:
    """The reactions to the end of a round, such as an escape check, called in a fixed order. A reaction that the
    options do not enable is None.

    `outcomes` counts rejected rounds and resets optimizers. It may raise NonFiniteError, after which no other reaction
    runs.

    Args:
        options: the options of local updates.
        optimizers: the inner optimizers.
        fragments: the parts of the model, each of which is exchanged separately.
        channel: the communicator of the workers.
        outer: the outer optimizer of the anchor, or None.
        shards: reductions over the processes of this worker.
        begun_at: see `Outcomes`.
        logs_clips: True if this worker logs the workers' clipped updates.
    """

    def __init__(
        self,
        options: LocalOptions,
        optimizers: Sequence[Optimizer],
        fragments: Sequence[Fragment],
        channel: Communicator,
        outer: Optimizer | None,
        shards: Shards,
        begun_at: Callable[[Fragment], list[Tensor]],
        *,
        logs_clips: bool,
    ) -> None:
        spec, c, rule, rank = options.compression, options.mean_momentum, options.escape, channel.group.rank
        self.clips = Clips(fragments, logs=logs_clips)
        self.outcomes = Outcomes(optimizers, fragments, shards, begun_at, spec.max_skipped, rank)
        momentum = MeanMomentum(optimizers, c, shards) if c else None
        if momentum is not None and rank == 0:
            momentum.warn_if_advised_against(outer, stacklevel=5)
        self.escape = None if rule is None else EscapeAnchor(rule, fragments, channel, options.seed)
        every: list[After | None] = [self.clips, self.outcomes, momentum, self.escape]
        self._all = [react for react in every if react is not None]
        # One record for each time that the escape check fired. The list is empty if there is no escape check.
        self.resets = list[Reset]() if self.escape is None else self.escape.resets

    def __call__(self, r: Ended) -> None:
        for react in self._all:
            react(r)

    def fields(self) -> list[Vector | Value]:
        """Return the fields of the saved state that belong to reactions: the counts of clipped updates and of rejected
        rounds, the state of the escape check, and the records of the times that the escape check fired."""
        check = () if self.escape is None else self.escape.check.fields()
        clipped = attribute(("clipped",), self.clips, "count", int)
        resets = Value(("resets",), list[Reset], lambda: self.resets, self._load_resets)
        return [*check, clipped, *self.outcomes.skips.fields(), resets]

    def _load_resets(self, saved: list[Reset]) -> None:
        self.resets[:] = saved


class Clips:
    """Records the workers' updates that were scaled down because their norms exceeded a limit (see `Workers.clip`).

    `found` lists the records since construction, or since a saved state was loaded. `count` is the number of records
    over the whole training. If `logs` is True, a worker whose updates are clipped in consecutive rounds of a fragment
    is logged at the 1st, 2nd, 4th, ... of these rounds.
    """

    def __init__(self, fragments: Sequence[Fragment], *, logs: bool) -> None:
        self.count, self._logs = 0, logs
        # By fragment (part of the model): the records, and the number of consecutive rounds in which each worker was
        # clipped.
        self._found: dict[Fragment, list[Clip]] = {part: [] for part in fragments}
        self._in_a_row: dict[Fragment, dict[str, int]] = {part: {} for part in fragments}

    @property
    def found(self) -> list[Clip]:
        return sorted((clip for clips in self._found.values() for clip in clips), key=lambda clip: clip.step)

    def __call__(self, r: Ended) -> None:
        if not r.applied:
            return
        self._found[r.part] += r.clips
        self.count += len(r.clips)
        before = self._in_a_row[r.part]
        self._in_a_row[r.part] = {clip.worker: before.get(clip.worker, 0) + 1 for clip in r.clips}
        for clip in r.clips:
            n = self._in_a_row[r.part][clip.worker]
            if self._logs and n & (n - 1) == 0:
                row = f" ({n} in a row)" if n > 1 else ""
                _log.warning(
                    "round %d: the update of worker %s was too long, and is scaled by %.3g; the rest stays in its "
                    "error memory%s",
                    *(r.t, clip.worker, clip.factor, row),
                )


class Outcomes:
    """Counts rejected rounds, and resets this worker's inner optimizers after an invalid local update.

    NonFiniteError is raised after more than `most` consecutive rejected rounds (None: no limit). `fragments` are the
    parts of the model. `agree` reduces a bool[...] with OR over the processes of this worker. `begun_at` returns the
    parameters of a fragment at the beginning of its running exchange, if there is one and they are valid, else [].

    A reset clears non-finite entries from the state of every torch optimizer of the parameters, including optimizers
    inside a wrapper. If an optimizer stores non-finite state elsewhere, its parameters become non-finite again.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        fragments: Sequence[Fragment],
        agree: Callable[[Tensor], Tensor],
        begun_at: Callable[[Fragment], list[Tensor]],
        most: int | None,
        rank: int,
    ) -> None:
        self._optimizers, self._fragments, self._agree, self._begun_at = optimizers, fragments, agree, begun_at
        self.skips = Skips(most, rank)
        self._device = local_part(fragments[0].parameters[0]).device

    def __call__(self, r: Ended) -> None:
        """Record the outcome of a round that has ended. Raises NonFiniteError after too many rejected rounds."""
        # Reset the count of consecutive rejections only if the last round of every fragment was applied. After a
        # rejected round the parameters of all fragments may be reset, which may make their updates zero. So an applied
        # round of one fragment does not show that the fragment of the rejected round has recovered.
        part = r.part
        if r.applied:
            part.was_rejected = False
            if not any(each.was_rejected for each in self._fragments):
                self.skips.reset_streak()
            return
        part.was_rejected = True
        # On a worker with an invalid update, clear non-finite optimizer state, and make the parameters finite.
        if r.invalid:
            self._clear()
            self._restore()
        # Count the rejected round. Raise an error on all workers after too many such rounds.
        self.skips.record(Skip.of(r.t, dict(enumerate(r.reports)), THE_MEAN, is_round=True))
        self.skips.check(self.skips.in_a_row)

    def _clear(self) -> None:
        """Clear non-finite state of all torch optimizers of the exchanged parameters, including those in a wrapper.

        If another process of this worker clears the state of a parameter, this process clears its own state of the
        parameter too. Collective over the processes of this worker.
        """
        parameters = [p for part in self._fragments for p in part.parameters]
        known, cleared = {id(p) for p in parameters}, set[Tensor]()
        found = [o for o in (*stepped_optimizers(), *self._optimizers) if known & set(map(id, parameters_of([o])))]
        for optimizer in found:
            cleared |= clear_nonfinite(optimizer)
        here = torch.tensor([p in cleared for p in parameters], device=self._device)
        elsewhere = self._agree(here) & ~here
        for p in (p for p, is_cleared in zip(parameters, elsewhere.tolist(), strict=True) if is_cleared):
            for optimizer in found:
                optimizer.state.pop(p, None)

    def _restore(self) -> None:
        """Reset the parameters of each fragment (parameters exchanged together) that has non-finite parameters. They
        are reset to their values at the start of the running exchange or after the last one. Without a reset, gradients
        would spread an Inf or NaN to other fragments. Collective over the processes of this worker."""
        for part in self._fragments:
            if not self._are_finite(part.trained_parameters):
                # Reset to the values at the beginning of the running exchange, if there is one and the values are
                # valid. Otherwise reset to the point at which this worker continued after the last exchange.
                if before := self._begun_at(part):
                    part.anchor.set_parameters(before)
                else:
                    part.anchor.move_to_start()

    def _are_finite(self, tensors: Iterable[Tensor]) -> bool:
        here = all(bool(is_finite(local_part(t))) for t in tensors)
        return not bool(self._agree(torch.tensor(not here, device=self._device)))


def clear_nonfinite(optimizer: Optimizer) -> set[Tensor]:
    """Delete the optimizer's state of each parameter whose state is non-finite, and return these parameters.

    A setting of a parameter group that contains NaN or a non-finite tensor is set to the optimizer's default. If this
    default is not a finite number, a setting that is a tensor is filled with zeros, and any other setting is not
    changed.
    """
    cleared = {p for p, entry in optimizer.state.items() if not _all_finite(entry)}
    for p in cleared:
        del optimizer.state[p]
    for group in optimizer.param_groups:
        for name, value in [(n, v) for n, v in group.items() if n != "params" and not _all_finite(v)]:
            default = optimizer.defaults.get(name)
            if not isinstance(default, int | float) or not math.isfinite(default):
                default = None
            if isinstance(value, Tensor):
                value.fill_(default or 0.0)
            elif default is not None:
                group[name] = default
    return cleared


def _all_finite(value: Any) -> bool:
    """Return True if all tensors in a nested value (mappings, lists and tuples) are finite and none of its numbers is
    NaN. Infinite numbers are allowed, since settings may be infinite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(is_finite(local_part(value)))
    if isinstance(value, Mapping):
        return all(map(_all_finite, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_all_finite, value))
    return not (isinstance(value, float) and math.isnan(value))


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

    def __call__(self, r: Ended) -> None:
        if not r.applied:
            return
        part = r.part
        try:
            reset, lost = self.check.run(part.rounds, part.feedback.memory.vector)
            if reset is not None:
                part.forget(lost)
                self.resets.append(reset)
        finally:
            part.anchor.move_to_start()
            if r.leaves_rest:
                part.anchor.move_to_anchor()
