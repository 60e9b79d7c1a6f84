"""How the mean update of an exchange is applied to the parameters: on all workers, or on none."""

from copy import deepcopy

import torch
from torch import Tensor

from packsaddle.comm.aggregators import Averaged
from packsaddle.feedback.memory import ErrorMemory
from packsaddle.feedback.round import Applied
from packsaddle.feedback.slices import FlatParameters
from packsaddle.numerics.finite import magnitude, overflow_margin
from packsaddle.sgd.lazy_noise import Perturber


class FlatTarget:
    """Applies the mean update of an exchange to the parameters x. If x would overflow, it leaves x unchanged, and the
    step is skipped."""

    defers = False

    def __init__(self, flat: FlatParameters, memory: ErrorMemory, noise: Perturber) -> None:
        self._flat, self._memory, self._noise = flat, memory, noise
        # True if an earlier update was so large that the parameters x could have overflowed; it stays True
        self._x_was_large = False
        self._first: float | None = None  # magnitude of x before the first step with weight decay; None: no such step

    def forget_x(self) -> None:
        """Measure x again before the next step. Call if a state was loaded."""
        self._first = None

    def decay_may_overflow(self, decay: float) -> bool:
        """Return True if `decay` times a parameter may overflow. `decay` is the largest weight decay, times the
        learning rate if that is above 1."""
        if decay and self._first is None:
            self._first = float(magnitude(self._flat.x))
        wide = torch.promote_types(self._flat.x.dtype, torch.float32)
        return self._x_was_large or not decay * (self._first or 0.0) <= overflow_margin(wide)

    def apply(self, g: Averaged, magnitude: Tensor | float) -> Applied:
        """Subtract the mean update g from the parameters x (line 11 of Algorithm 1). If x would overflow, x is
        unchanged.

        `magnitude` is the approximate maximum of the absolute values of g.
        """
        # If the change of every parameter is below a bound, no parameter can overflow, so x need not be checked.
        x = self._flat.x
        if float(magnitude) + self._noise.bound <= overflow_margin(x.dtype):
            return Applied(rounding=self._move(g))
        # The parameters x may overflow: apply the mean, check x, and restore x if it did overflow.
        self._x_was_large = True
        before, noise = x.clone(), deepcopy(self._noise.outstanding)
        rounding = self._move(g)
        if bool((x.isfinite() | ~before.isfinite()).all()):
            return Applied(rounding=rounding)
        x.copy_(before)
        self._noise.outstanding = noise
        return Applied(fits=False)

    def _move(self, g: Averaged) -> Tensor | None:
        """Subtract the mean update g from the parameters x.

        If noise is lazy, first add to g the noise of the coordinates that were sent, for all steps since they were last
        sent. Returns the rounding error of x, float[d], or None if x is in at least float32.
        """
        self._noise.add_outstanding(g)
        return self._flat.change(lambda x: self._memory.apply_mean(x, g))
