"""Hessian-vector products and their errors, by double backward or by central differences of gradients.

`choose_products` selects the method. Double backward is exact up to rounding. Torch has no second derivatives of fused
attention and of compiled networks. For these `Differences` computes (g(x + h v) - g(x - h v)) / (2 h), where g is the
gradient, x are the parameters and h is the step. For a unit vector v the error of this quotient is

    rounding / h + h^2 M_3 / 6,    where M_3 is the norm of the third derivative of g along v,

Both terms are measured at x and along v. Hessian-vector products with steps h and 17 h / 16 differ almost only by
rounding. Those with steps h and 2 h differ by rounding and by h^2 M_3 / 2, which is three times the second term. From
the measured terms h is chosen such that the first term is twice the second.

Double backward in a dtype shorter than float64 has rounding errors, which cancellation inside the network can make much
larger than the unit roundoff. They are measured by comparison with the product of a float64 copy of the model, for two
vectors v: the first v of the search, and the v whose curvature decides if the point is a saddle.

A custom `autograd.Function` may have a correct first and a wrong second derivative (see `custom_functions`). If a loss
contains such a function, Hessian-vector products by double backward are compared with differences of gradients for the
same two vectors v.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from packsaddle.curvature.custom_functions import custom_functions
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.options import Hvp

Result = TypeVar("Result")

# Ratio of two steps h of differences of gradients, whose products then differ almost only by rounding.
_NEARBY = 17 / 16
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
_ROOM_FOR_SHORT_STEPS = 1e-12
_SHORTEST = 64  # smallest step h of the differences, in units of the last place of ||x||
_CHECK_EVERY = 2  # growth factor: the error is measured at the 1st, 2nd, 4th, 8th, ... Hessian-vector product
# Distance from x, to each side along a unit vector v, over which the change of H v is measured. It gives an estimate of
# the Hessian's Lipschitz constant.
_RHO_DISTANCE = 1e-2
# Products by two methods count as different if their distance exceeds this multiple of the sum of their errors.
_DOUBT = 2
# Products by two methods can be compared if `_DOUBT` times the sum of their errors is at most this fraction of the
# largest product's norm.
_SURE = 0.01
_ROUNDING = 16  # error of a Hessian-vector product by double backward, in units of its last place
# A loss counts as random if a repeated Hessian-vector product differs from the first one by more than this multiple of
# sqrt(unit roundoff), relative to the first one's norm.
_RANDOM = 16
# Upper limit on that relative difference. It matters for 16-bit dtypes, where the limit by `_RANDOM` would exceed 1/4.
_RANDOM_OF_16_BITS = 0.25


class DoubleBackwardError(ValueError):
    """Raised if Hessian-vector products by double backward are wrong for a loss.

    `reason` describes how they differ from differences of gradients.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"hvp must be 'differences' or 'auto' for this loss: {reason}")
        self.reason = reason


class Products(ABC):
    """Interface of the Hessian-vector products of a mean loss over the batches of all workers. Calls are collective.

    `error` is the largest ||H v - product|| that was measured for unit vectors v so far. `relative_error` is the same
    for rounding alone, relative to ||H v||, for a random v.
    """

    name: str
    # Message of the error by which double backward failed; None: it did not fail, or was not tried.
    reason: str | None = None
    precision: float  # unit roundoff of the Hessian-vector products
    error: float = 0.0
    relative_error: float = 0.0
    unproven = False  # True if `checked` must verify the product along the direction that decides a verdict

    def __init__(self, curvature: Curvature) -> None:
        self.curvature = curvature

    @abstractmethod
    def __call__(self, v: Tensor) -> Tensor:
        """Return the Hessian-vector product H v, float64[d], for a unit vector v, float64[d]."""

    @abstractmethod
    def checked(self, v: Tensor) -> tuple[Tensor, float]:
        """Return the product H v, float64[d], for a unit vector v, float64[d], and measure its error. The second result
        is this error. If it exceeds `self.error`, it becomes `self.error`."""

    @abstractmethod
    def change(self, v: Tensor) -> float:
        """Return ||d/ds H(x + s v) v|| at s = 0, for a unit vector v, float64[d]. It is the rate at which the
        Hessian-vector product H v changes if the parameters x move along v.

        The derivative is approximated by a difference quotient, over a distance of at least 0.01 to each side of x.
        """

    def rho(self, v: Tensor) -> float:
        """Return a lower estimate of rho, the Lipschitz constant of the Hessian. It is `change(v)`, the rate at which
        the product H v changes along v, or the smallest normal float64 if that rate is 0."""
        return max(self.change(v), torch.finfo(torch.float64).tiny)


class DoubleBackward(Products):
    """Hessian-vector products by double backward, i.e. as the gradient of the inner product <grad f, v>.

    The first product is computed twice. Raises ValueError if the two results differ, as they do for a random loss.

    If `precision` is coarser than float64's, the rounding errors of the first product and of the products of `checked`
    are measured with a float64 copy of the model. If no such copy works, half of the digits of the first product are
    assumed wrong, and the products of `checked` are compared with differences of gradients.

    If the loss contains custom functions (`autograd.Function`), the first product and the products of `checked` are
    compared with differences of gradients. Raises DoubleBackwardError if the two products differ by more than twice the
    sum of their errors, or if these errors are too large for a comparison.
    """

    name = "double backward"

    def __init__(self, curvature: Curvature) -> None:
        super().__init__(curvature)
        self.precision = curvature.precision
        self._begun = False
        self._custom: set[str] = set()  # names of the custom functions in this worker's losses
        self._largest = 0.0  # largest norm of a Hessian-vector product so far
        # Differences of gradients, with which products by double backward are compared; None: no comparison was made
        # yet.
        self._differences: Differences | None = None
        # True if a comparison in a dtype shorter than float64 has failed; later comparisons are then in float64
        self._coarse = False

    def __call__(self, v: Tensor) -> Tensor:
        return self.curvature.hessian_vector(v) if self._begun else self.checked(v)[0]

    def checked(self, v: Tensor) -> tuple[Tensor, float]:
        product = self.curvature.hessian_vector(v, lambda loss: self._custom.update(custom_functions(loss)))
        norm = float(product.norm())
        first, self._begun, self._largest = not self._begun, True, max(self._largest, norm)
        if first:
            apart = float(self.curvature.hessian_vector(v).sub_(product).norm())
            allowed = min(_RANDOM * math.sqrt(self.precision), _RANDOM_OF_16_BITS)
            if apart > allowed * norm:
                raise ValueError(
                    "loss_fn gave two Hessian-vector products for the same parameters, batches and vector: switch off "
                    "everything that is random"
                )
        self.unproven = self.curvature.on_any_worker(bool(self._custom))
        if self.unproven:
            self._compare(v, product)
        error = self._rounding_error(v, product, first)
        self.error = max(self.error, error)
        if first and norm:
            self.relative_error = error / norm
        return product, error

    def _rounding_error(self, v: Tensor, product: Tensor, first: bool) -> float:
        """Return the rounding error of `product`, the Hessian-vector product with v, or 0 in float64; collective.

        It is the distance from the product of a float64 copy of the model. Without such a copy it is the distance from
        differences of gradients plus their error. Their error is too large for the `first` product, whose relative
        error is assumed to be the square root of the unit roundoff.
        """
        if self.precision <= torch.finfo(torch.float64).eps:
            return 0.0
        exact, error = self.curvature.product_in_double(v), 0.0
        if exact is None and first:
            return math.sqrt(self.precision) * float(product.norm())
        if exact is None:
            exact, error = Differences(self.curvature).checked(v)
        return float(exact.sub_(product).norm()) + error

    def _compare(self, v: Tensor, product: Tensor) -> None:
        """Compare `product`, the Hessian-vector product with v by double backward, with differences of gradients;
        collective.

        Raises DoubleBackwardError on all workers if the two differ. In dtypes shorter than float64 kinks of the loss
        can also cause a difference, so the comparison is then repeated with a float64 copy of the model. The error is
        raised if that comparison confirms the difference, or if the copy cannot compute the loss.
        """
        why = None
        if not self._coarse:
            self._differences = self._differences or Differences(self.curvature)
            why = _disagreement(self._differences, v, product, self._largest)
            self._coarse = why is not None and self.precision > _ROOM_FOR_SHORT_STEPS
        if self._coarse:
            self.curvature.products += 2
            why = self._disagreement_in_double(v)
        if self.curvature.on_any_worker(why is not None):
            names = ", ".join(sorted(self._custom)) or "of another worker"
            why = why or "another worker's product differs from differences of gradients"
            raise DoubleBackwardError(f"{why}; the loss has a custom autograd.Function, {names}")

    def _disagreement_in_double(self, v: Tensor) -> str | None:
        try:
            curvature = self.curvature.in_double()
            if curvature is None:
                return None
            why = _disagreement(Differences(curvature), v, curvature.hessian_vector(v), self._largest)
        except Exception as error:  # a loss may raise any error with dtypes that it was not written for
            return f"its product cannot be compared with differences of gradients in float64 ({type(error).__name__})"
        self.curvature.passes += curvature.passes
        return why and f"in float64 {why}"

    def change(self, v: Tensor) -> float:
        h = _RHO_DISTANCE
        with self.curvature.moved(v, h):
            ahead = self.curvature.hessian_vector(v)
        with self.curvature.moved(v, -h):
            behind = self.curvature.hessian_vector(v)
        return float((ahead - behind).norm()) / (2 * h)


@dataclass(frozen=True)
class _Trial:
    """A Hessian-vector product by differences of gradients with step h, and its measured errors."""

    step: float  # step h of the finite differences
    product: Tensor  # Hessian-vector product, float64[d]
    noise: float  # estimated rounding error of `product`, which is proportional to 1 / h
    apart: float  # norm of the difference between `product` and the product with step 2 h
    error: float  # estimated error of `product` by rounding and by higher derivatives


def _disagreement(differences: "Differences", v: Tensor, product: Tensor, largest: float) -> str | None:
    """Compare `product`, the Hessian-vector product with v by double backward, with the product by `differences`.

    Returns None if the two differ by no more than their errors allow, and otherwise a message that describes the
    difference. Also returns a message if twice the sum of the errors exceeds 1% of `largest`, the largest norm of a
    product, since large errors could hide a missing term.
    """
    curvature = differences.curvature
    other, error = differences.checked(v)
    size = max(float(product.norm()), float(other.norm()))
    apart = float(other.sub_(product).norm())
    largest = max(largest, size)
    allowed = _DOUBT * (error + _ROUNDING * curvature.precision * largest)
    if apart <= allowed <= _SURE * largest:
        return None
    return f"its product of norm {size:.1e} differs by {apart:.1e} from differences of gradients (error {error:.1e})"


class Differences(Products):
    """Hessian-vector products by central differences of gradients, (g(x + h v) - g(x - h v)) / (2 h).

    Here g is the gradient, x are the parameters, v is a unit vector and h is the step, which is chosen by measured
    errors (see the module's docstring). 16-bit parameters are rounded stochastically, so that on average they move by
    exactly h v.
    """

    name = "differences of gradients"
    precision = torch.finfo(torch.float64).eps

    def __init__(self, curvature: Curvature, reason: str | None = None) -> None:
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
            shrunk = far and float(tried.product.norm()) < _SHRUNK * float(best.product.norm())
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
        return best.error > _FAR * float(best.product.norm()) and (last.noise < last.apart or not rounds)

    def _between_kinks(self, v: Tensor, best: _Trial) -> _Trial:
        """Try shorter steps h, until a step crosses no kink of the loss, such as that of a ReLU. Return the trial with
        the smallest error, which may be `best` itself.

        Only float64 is precise enough for such short steps. Two steps of similar length cross different kinks, so the
        error grows as the step shortens, until the step crosses no kink. The product then equals the product by double
        backward.
        """
        step = best.step
        while self._eps < _ROOM_FOR_SHORT_STEPS and best.error > _KINKED * float(best.product.norm()):
            step /= _FARTHEST
            if step < self._shortest:
                break
            tried = self._trial(v, step)
            best = tried if tried.noise and tried.error < best.error else best
        return best

    def _trial(self, v: Tensor, h: float) -> _Trial:
        product = self._difference(v, h)
        noise = float((self._difference(v, _NEARBY * h) - product).norm())
        noise = max(noise, self._eps * float(product.norm()))
        apart = float((self._difference(v, 2 * h) - product).norm())
        return _Trial(h, product, noise, apart, max(noise + apart / 3, 2 * apart))

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
        s = max(_RHO_DISTANCE, 2 * self.step)
        second = self.curvature.gradient_at(v, s).add_(self.curvature.gradient_at(v, -s))
        second.sub_(self.curvature.gradient_at(v, 0.0), alpha=2.0)
        square = float(second.norm()) ** 2 - 6 * self._rounding**2
        return math.sqrt(max(square, 0.0)) / (s * s)


def choose_products(curvature: Curvature, hvp: Hvp) -> Products:
    """Return an object that computes Hessian-vector products by the method `hvp`; collective.

    "auto" selects double backward if it succeeds on the first batch of every worker, and otherwise differences of
    gradients.
    """
    if hvp == "differences":
        return Differences(curvature)
    if hvp == "auto" and (reason := curvature.why_no_double_backward()) is not None:
        return Differences(curvature, reason)
    return DoubleBackward(curvature)


def with_products(products: Products, hvp: Hvp, work: Callable[[Products], Result]) -> Result:
    """Call the function `work` with `products`, and return its result; collective.

    `products` is the result of `choose_products` for the method `hvp`. If double backward proves wrong during the call
    and `hvp` is "auto", `work` is called again with differences of gradients. If `hvp` is "double-backward",
    DoubleBackwardError is raised.
    """
    try:
        return work(products)
    except DoubleBackwardError as error:
        if hvp != "auto":
            raise
        return work(Differences(products.curvature, error.reason))
