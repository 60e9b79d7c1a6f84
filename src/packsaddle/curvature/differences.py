"""Hessian-vector products by central differences of gradients, and their errors.

Torch has no second derivatives of fused attention and of compiled networks, and a sharded network has none either. For
these `Differences` computes (g(x + h v) - g(x - h v)) / (2 h), where g is the gradient, x are the parameters and h is
the step. For a unit vector v the error of this quotient is

    rounding / h + h^2 M_3 / 6,    where M_3 is the norm of the third derivative of g along v,

Both terms are measured at x and along v. Hessian-vector products with steps h and 17 h / 16 differ almost only by
rounding. Those with steps h and 2 h differ by rounding and by h^2 M_3 / 2, which is three times the second term. From
the measured terms h is chosen such that the first term is twice the second.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.curvature.mean_loss import MeanLoss
from packsaddle.curvature.products import RHO_DISTANCE, Products, spare_of

# Ratio of two steps h of differences of gradients, whose products then differ almost only by rounding.
_NEARBY = 17 / 16
_FEWEST_ERRORS = 16  # smallest number of rounding errors, one for each coordinate and step h, whose norm is measured
_ROUNDS = 6  # maximum number of steps h to try for one Hessian-vector product
_LONGEST = 1 / 16  # largest step h, relative to ||x||; for longer steps the error is not rounding / h + h^2 M_3 / 6
_FARTHEST = 64.0  # largest ratio of two step sizes h that are tried consecutively
# Relative error of a Hessian-vector product above which its step h is too long for the errors to predict a better h.
_FAR = 0.1
_SHORTEN = 1 / 16  # largest ratio of the next step h to the last one, if the last one is far too long
# If the norm of a Hessian-vector product falls below this fraction of its norm with a longer step h, then the shorter
# step is too short to change some 16-bit parameters.
_SHRUNK = 0.9
_LOUD = 16  # errors above this multiple of the smallest rounding error measured so far are not caused by rounding
# Relative error of a float64 Hessian-vector product above which the loss is assumed to have kinks, such as those of a
# ReLU.
_KINKED = 1e-3
# Steps short enough to cross no kink are tried only if the unit roundoff of the loss is below this number.
ROOM_FOR_SHORT_STEPS = 1e-12
_SHORTEST = 64  # smallest step h of the differences, in units of the last place of ||x||
_CHECK_EVERY = 2  # growth factor: the error is measured at the 1st, 2nd, 4th, 8th, ... Hessian-vector product


@dataclass(frozen=True)
class _Trial:
    """A Hessian-vector product by differences of gradients with step h, and its measured errors."""

    step: float  # step h of the finite differences
    product: Tensor  # Hessian-vector product, float64[d]
    noise: float  # estimated rounding error of `product`, which is proportional to 1 / h
    apart: float  # norm of the difference between `product` and the product with step 2 h
    error: float  # estimated error of `product` by rounding and by higher derivatives


class Differences(Products):
    """Hessian-vector products by central differences of gradients, (g(x + h v) - g(x - h v)) / (2 h).

    Here g is the gradient, x are the parameters, v is a unit vector and h is the step, which is chosen by measured
    errors (see the module's docstring). 16-bit parameters are rounded stochastically, so that on average they move by
    exactly h v.
    """

    name = "differences of gradients"
    precision = torch.finfo(torch.float64).eps

    def __init__(self, curvature: MeanLoss, reason: str | None = None) -> None:
        super().__init__(curvature)
        self.reason = reason
        self._eps = curvature.precision
        reach = max(1.0, curvature.size_of_parameters())
        self._longest, self._shortest = _LONGEST * reach, _SHORTEST * self._eps * reach
        self.step = min(math.cbrt(self._eps) * reach, self._longest)  # first guess of the step h of the differences
        self._rounding = 0.0  # norm of the rounding error of one gradient, measured; 0: not measured yet
        # Smallest of the values of `_rounding` measured so far; inf: not measured yet.
        self._quietest = math.inf
        self._count, self._next_check = 0, 1

    def over(self, part: MeanLoss) -> "Differences":
        other = Differences(part, self.reason)
        other.continue_from(self)
        return other

    def continue_from(self, other: Products) -> None:
        assert isinstance(other, Differences)
        self.step, self._rounding, self._quietest = other.step, other._rounding, other._quietest

    def __call__(self, v: Tensor) -> Tensor:
        self._count += 1
        if self._count == self._next_check:
            self._next_check *= _CHECK_EVERY
            return self.checked(v)[0]
        self.curvature.products += 1
        return self._difference(v, self.step)

    def checked(self, v: Tensor) -> tuple[Tensor, float]:
        self.curvature.products += 1
        best = last = self._trial(v, self.step)
        for _ in range(_ROUNDS - 1):
            far = self._is_far(last, best)
            step = min(last.step * min(self._better(last), _SHORTEN if far else math.inf), self._longest)
            if 0.5 <= step / last.step <= 2:
                break
            tried = self._trial(v, step)
            worse = tried.error > best.error > 0
            # Stop if the product of this step h is worse than the best one, or if the step is too short to change any
            # parameter.
            if (worse and not far) or (far and not tried.noise):
                break
            # In a sharp valley a shorter step gives a larger product. A smaller product means that some parameters did
            # not move.
            shrunk = far and self.curvature.norm(tried.product) < _SHRUNK * self.curvature.norm(best.product)
            best, last = best if worse or shrunk else tried, tried
        best = self._between_kinks(v, best)
        self.step, self._rounding = best.step, best.noise * best.step
        self._quietest = min(self._quietest, self._rounding) if self._rounding else self._quietest
        self.error = max(self.error, best.error)
        return best.product, best.error

    def _is_far(self, last: _Trial, best: _Trial) -> bool:
        """Return True if the step h of the trial `last` was far too long.

        The product is then mostly an error from higher derivatives, from which no better step can be predicted. This
        occurs if a step that was chosen along a flat direction is used along a direction of large curvature. `best` is
        the trial with the smallest error so far.
        """
        rounds = last.noise * last.step <= _LOUD * self._quietest
        return best.error > _FAR * self.curvature.norm(best.product) and (last.noise < last.apart or not rounds)

    def _between_kinks(self, v: Tensor, best: _Trial) -> _Trial:
        """Try shorter steps h, until a step crosses no kink of the loss, such as that of a ReLU. Return the trial with
        the smallest error, which may be `best` itself.

        Only float64 is precise enough for such short steps. Two steps of similar length cross different kinks, so the
        error grows as the step shortens, until the step crosses no kink. The product then equals the product by double
        backward.
        """
        step = best.step
        while self._eps < ROOM_FOR_SHORT_STEPS and best.error > _KINKED * self.curvature.norm(best.product):
            step /= _FARTHEST
            if step < self._shortest:
                break
            tried = self._trial(v, step)
            best = tried if tried.noise and tried.error < best.error else best
        return best

    def _trial(self, v: Tensor, h: float) -> _Trial:
        product = self._difference(v, h)
        # Measure rounding at several steps if there are few coordinates, since a single error may be small by chance.
        count = math.ceil(_FEWEST_ERRORS / self.curvature.d)
        steps = [h * (1 + (_NEARBY - 1) * i / count) for i in range(1, count + 1)]
        noise = math.hypot(*(self.curvature.norm(self._difference(v, step).sub_(product)) for step in steps))
        noise /= math.sqrt(count)
        noise = max(noise, self._eps * self.curvature.norm(product))
        apart = self.curvature.norm(self._difference(v, 2 * h).sub_(product))
        return _Trial(h, product, noise, apart, max(spare_of(self.curvature.d) * noise + apart / 3, 2 * apart))

    @staticmethod
    def _better(trial: _Trial) -> float:
        """Return the ratio of the best step h to the step of `trial`, limited to the range from 1/64 to 64.

        At the best step, the rounding error of the product is twice its error from third derivatives (see the module's
        docstring).
        """
        # If the steps h and 17 h / 16 give equal products, either the gradient is constant, or the steps are too short
        # to change any 16-bit parameter.
        if trial.noise == 0.0:
            return _FARTHEST
        # If each gradient has an independent rounding error of norm e, rounding adds 5/8 (e / h)^2 to apart^2, and
        # 0.94 (e / h)^2 to noise^2.
        squares = trial.apart**2 - 0.66 * trial.noise**2
        curved = max(math.sqrt(max(squares, 0.0)), trial.noise / 64) / 3
        # Between h and 17 h / 16, the term h^2 M_3 / 6 changes by 0.129 of its value.
        noise = max(trial.noise - 0.043 * trial.apart, trial.noise / 8)
        return min(max(math.cbrt(noise / (2 * curved)), 1 / _FARTHEST), _FARTHEST)

    def _difference(self, v: Tensor, h: float) -> Tensor:
        ahead = self.curvature.gradient_at(v, h)
        return ahead.sub_(self.curvature.gradient_at(v, -h)).div_(2 * h)

    def change(self, v: Tensor) -> float:
        """Return an estimate of ||d/ds H(x + s v) v|| at s = 0, the rate at which the Hessian-vector product H v
        changes along v. It is the norm of the gradient's second difference with step s, divided by s^2 and corrected
        for rounding."""
        s = max(RHO_DISTANCE, 2 * self.step)
        second = self.curvature.gradient_at(v, s).add_(self.curvature.gradient_at(v, -s))
        second.sub_(self.curvature.gradient_at(v, 0.0), alpha=2.0)
        square = self.curvature.norm(second) ** 2 - 6 * self._rounding**2
        return math.sqrt(max(square, 0.0)) / (s * s)
