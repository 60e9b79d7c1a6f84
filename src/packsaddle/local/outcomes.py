"""Reactions to the outcomes of rounds: rejected rounds are counted, and optimizers that made parameters non-finite are
reset.

A reset clears non-finite entries from the state of every torch optimizer of the parameters, including optimizers inside
a wrapper. If an optimizer stores non-finite state elsewhere, its parameters become non-finite again, and all workers
raise NonFiniteError after `max_skipped` rejected rounds.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import local_part
from packsaddle.feedback.guard import THE_MEAN, Skip, Skips
from packsaddle.feedback.optimizers import parameters_of
from packsaddle.local.fragment import Fragment
from packsaddle.local.inner import stepped_optimizers
from packsaddle.local.round import LocalRound
from packsaddle.numerics.finite import is_finite


class Outcomes:
    """Counts rejected rounds, and resets this worker's inner optimizers after an invalid local update.

    NonFiniteError is raised after more than `most` consecutive rejected rounds (None: no limit). `fragments` are the
    parts of the model. `agree` reduces a bool[...] with OR over the processes of this worker.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        fragments: Sequence[Fragment],
        agree: Callable[[Tensor], Tensor],
        most: int | None,
        rank: int,
    ) -> None:
        self._optimizers, self._fragments, self._agree = optimizers, fragments, agree
        self.skips = Skips(most, rank)
        self._device = local_part(fragments[0].parameters[0]).device

    def __call__(self, r: LocalRound) -> None:
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
        if bool(r.invalid):
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
                p = part.current
                if p is not None and p.before and not bool(p.invalid):
                    part.anchor.set_parameters(p.before)
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
