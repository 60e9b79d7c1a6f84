"""Reactions to the outcomes of rounds: rejected rounds are counted, and optimizers that made parameters non-finite are
reset.

A reset has up to two stages. First, non-finite entries are cleared from the state of every torch optimizer of the
parameters, including optimizers inside a wrapper. If a step with finite gradients then makes a parameter non-finite
again, an optimizer must store non-finite state elsewhere. So, in the second stage, each inner optimizer's `state_dict`
is read, the non-finite entries are cleared, and the result is loaded back. If a parameter becomes non-finite once more,
the reset has failed, and all workers raise NonFiniteError.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from packsaddle.comm.sharding import local_part
from packsaddle.feedback.guard import THE_MEAN, THE_UPDATE, NonFiniteError, Skip, Skips
from packsaddle.feedback.optimizers import parameters_of
from packsaddle.feedback.report import Report
from packsaddle.feedback.state import Value, attribute
from packsaddle.local.fragment import Fragment
from packsaddle.local.inner import names_of, stepped_optimizers
from packsaddle.local.round import LocalRound
from packsaddle.numerics.finite import first_out_of_range, is_finite

_log = logging.getLogger("packsaddle")


class Outcomes:
    """Counts rejected rounds, and resets this worker's inner optimizers after an invalid local update.

    NonFiniteError is raised after more than `most` consecutive rejected rounds (None: no limit). After an optimizer's
    reset, the parameters are checked in each step until the local updates of all `fragments` (the parts of the model)
    are valid again. `agree` reduces a bool[...] with OR over the processes of this worker.
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
        self._reloaded = False  # True if state dicts were cleared and loaded back after an invalid update
        # True if parameters became non-finite again after state dicts were
        # loaded back, in a step with finite gradients.
        self._failed = False

    def fields(self) -> list[Value]:
        own = ("reset", "reloaded"), ("reset", "failed")
        return [*self.skips.fields(), *(attribute(path, self, f"_{path[1]}", bool) for path in own)]

    @property
    def _waits(self) -> bool:
        """True while this worker's last local update of a fragment (parameters exchanged together) was invalid, so that
        a reset of its optimizers may be in progress."""
        return any(part.was_invalid for part in self._fragments)

    def register(self, r: LocalRound) -> None:
        """Update the progress of a reset of this worker's optimizers at the beginning of a round of one fragment
        (parameters exchanged together). Call before the exchange.

        If the fragment's new update is valid, the fragment no longer counts as invalid. If the new update is invalid
        and the reset has failed, this worker reports the failure to all workers in the round `r`.
        """
        part = r.part
        if self._waits and not bool(r.invalid):
            part.was_invalid = False
            if not self._waits:
                self._reloaded = self._failed = False
        elif self._failed:
            named = zip(part.places, part.anchor.tensors(), strict=True)
            assert r.exchanged is not None
            name = first_out_of_range(((place.name, x) for place, x in named), self._agree) or THE_UPDATE
            r.exchanged.report = Report("reset", name)

    def __call__(self, r: LocalRound) -> None:
        """Record the outcome of a round that has ended.

        Raises NonFiniteError after too many rejected rounds, or if the inner optimizer of a worker could not be reset.
        """
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
            part.was_invalid = True
            self._restore()
        # Count the rejected round. Raise an error on all workers if a reset has failed, or after too many such rounds.
        self.skips.record(Skip.of(r.t, dict(enumerate(r.reports)), THE_MEAN, is_round=True))
        for worker, report in enumerate(r.reports):
            if report.kind == "reset":
                raise NonFiniteError(
                    f"{report.name} on worker {worker} is not finite after a step with finite "
                    f"gradients, and {names_of(self._optimizers)} could not be reset: there is non-finite state "
                    f"outside of the state of torch optimizers and of state_dict(), or a learning rate that "
                    f"overflows. Implement state_dict() and load_state_dict() for all of the state, or lower the "
                    f"learning rate"
                )
        self.skips.check(self.skips.in_a_row)

    def check_step(self) -> None:
        """Run the second stage of a reset if parameters are non-finite after an inner step with finite gradients: clear
        non-finite entries of the optimizers' state dicts, and load the state dicts back. Call after each inner step.

        If the second stage has run before, the reset has failed instead. No-op unless this worker's last local update
        of some parameters was invalid. Collective over the processes of this worker.
        """
        if not self._waits or self._failed:
            return
        trained = [p for part in self._fragments for p in part.trained_parameters]
        gradients = [p.grad for p in trained if p.grad is not None]
        if not self._are_finite(gradients) or self._are_finite(trained):
            return
        if self._reloaded:
            self._failed = True
            return
        self._clear()
        for optimizer in self._optimizers:
            try:
                state = optimizer.state_dict()
                if not _all_finite(state):
                    optimizer.load_state_dict(_finite_part(state))
            except Exception:
                # Do not raise here, since the other workers would wait for this worker in the next round. If a
                # parameter is still non-finite then, this worker's report in that round names it.
                _log.warning("the state of %s could not be reset", type(optimizer).__name__, exc_info=True)
        self._reloaded = True
        self._restore()

    def _clear(self) -> None:
        """Clear non-finite state of all torch optimizers of the exchanged parameters, including those in a wrapper.

        If another process of this worker clears the state of a parameter, this process clears its own state of the
        parameter too. Collective over the processes of this worker.
        """
        self._failed = False
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


def _finite_part(value: Any, name: Any = None) -> Any:
    """Return a copy of a state dict in which the non-finite entries of each mapping called "state" are removed, and all
    other non-finite tensors are replaced with zeros. `name` is the key of `value` in the state dict; None: `value` has
    no key."""
    if isinstance(value, Mapping):
        kept = {k: v for k, v in value.items() if name != "state" or _all_finite(v)}
        return {k: _finite_part(v, k) for k, v in kept.items()}
    if isinstance(value, list | tuple):
        parts = [_finite_part(v) for v in value]
        return parts if isinstance(value, list) else tuple(parts)
    return torch.zeros_like(value) if isinstance(value, Tensor) and not _all_finite(value) else value


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
