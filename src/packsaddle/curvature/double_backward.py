"""Hessian-vector products by double backward, and their errors.

Double backward is exact up to rounding. In a dtype shorter than float64 its rounding errors, which cancellation inside
the network can make much larger than the unit roundoff, are measured by comparison with the product of a float64 copy
of the model, for two vectors v: the first v of the search, and the v whose curvature decides if the point is a saddle.
With many batches an eighth of them is compared, or the sample on which v was found, and the difference is doubled: the
mean over all batches averages more rounding errors, so that its own is hardly larger.

A custom `autograd.Function` may have a correct first and a wrong second derivative (see `custom_functions`). If a loss
contains such a function, Hessian-vector products by double backward are compared with differences of gradients for the
same two vectors v.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from packsaddle.curvature.custom_functions import custom_functions
from packsaddle.curvature.differences import ROOM_FOR_SHORT_STEPS, Differences
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.mean_loss import MeanLoss
from packsaddle.curvature.options import Hvp
from packsaddle.curvature.products import RHO_DISTANCE, Products, spare_of

Result = TypeVar("Result")

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
_COMPARED = 8  # ratio of all examples to those whose products are computed in float64
_SPARED = 2  # factor of the rounding error that is measured on a part of the examples


class DoubleBackwardError(ValueError):
    """Raised if Hessian-vector products by double backward are wrong for a loss.

    `reason` describes how they differ from differences of gradients.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"hvp must be 'differences' or 'auto' for this loss: {reason}")
        self.reason = reason


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
    curvature: Curvature

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

    def over(self, part: MeanLoss) -> "DoubleBackward":
        assert isinstance(part, Curvature)
        return DoubleBackward(part)

    def continue_from(self, other: Products) -> None:
        assert isinstance(other, DoubleBackward)
        # The rounding errors of parts of batches say little of those of whole batches.
        if other.curvature.is_cut and self.precision > torch.finfo(torch.float64).eps:
            return
        self._begun, self._largest = True, max(self._largest, other._largest)
        self.error = max(self.error, _spared(other.curvature) * other.error)
        self.relative_error = max(self.relative_error, _spared(other.curvature) * other.relative_error)

    def for_proof(self, v: Tensor) -> tuple[Tensor, float]:
        if self.unproven or not self._begun:
            return self.checked(v)
        product = self._inspected(v)
        self._verify(v, product)
        return product, self.error

    def __call__(self, v: Tensor) -> Tensor:
        return self.curvature.hessian_vector(v) if self._begun else self.checked(v)[0]

    def checked(self, v: Tensor) -> tuple[Tensor, float]:
        product = self._inspected(v)
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
        self._verify(v, product)
        error = self._rounding_error(v, product, first)
        self.error = max(self.error, error)
        if first and norm:
            self.relative_error = error / norm
        return product, error

    def _inspected(self, v: Tensor) -> Tensor:
        """Return the product with v, and collect the custom functions of the losses."""
        return self.curvature.hessian_vector(v, lambda loss: self._custom.update(custom_functions(loss)))

    def _verify(self, v: Tensor, product: Tensor) -> None:
        """Compare `product` with differences of gradients if a loss of any worker has a custom function."""
        self.unproven = self.curvature.on_any_worker(bool(self._custom))
        if self.unproven:
            self._compare(v, product)

    def _rounding_error(self, v: Tensor, product: Tensor, first: bool) -> float:
        """Return the rounding error of `product`, the Hessian-vector product with v, or 0 in float64; collective.

        It is the distance from the product of a float64 copy of the model, over a part of the examples if there are
        many. Without such a copy it is the distance from differences of gradients plus their error. Their error is too
        large for the `first` product, whose relative error is assumed to be the square root of the unit roundoff.
        """
        if self.precision <= torch.finfo(torch.float64).eps:
            return 0.0
        part = self.curvature.sample(self.curvature.examples // _COMPARED, cut=False)
        if part is not None:
            exact = part.product_in_double(v)
            apart = 0.0 if exact is None else _spared(part) * float(exact.sub_(part.hessian_vector(v)).norm())
            self.curvature.count(part)
            self.curvature.products += 1
        elif (exact := self.curvature.product_in_double(v)) is not None:
            apart = float(exact.sub_(product).norm())
        if exact is not None:
            return apart
        if first:
            return math.sqrt(self.precision) * float(product.norm())
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
            self._coarse = why is not None and self.precision > ROOM_FOR_SHORT_STEPS
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
        h = RHO_DISTANCE
        with self.curvature.moved(v, h):
            ahead = self.curvature.hessian_vector(v)
        with self.curvature.moved(v, -h):
            behind = self.curvature.hessian_vector(v)
        return float((ahead - behind).norm()) / (2 * h)


def _spared(part: MeanLoss) -> float:
    """Return the factor by which a rounding error that was measured on a part of the examples is enlarged."""
    return _SPARED * spare_of(part.d)


def _disagreement(differences: Differences, v: Tensor, product: Tensor, largest: float) -> str | None:
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


def choose_products(curvature: MeanLoss, hvp: Hvp) -> Products:
    """Return an object that computes Hessian-vector products by the method `hvp`; collective.

    "auto" selects double backward if it succeeds on the first batch of every worker, and otherwise differences of
    gradients. Raises ValueError for "double-backward" with a sharded model, which has no double backward.
    """
    if hvp == "differences":
        return Differences(curvature)
    if not isinstance(curvature, Curvature):
        if hvp == "double-backward":
            raise ValueError("hvp must be 'differences' or 'auto' for a sharded model: it has no double backward")
        return Differences(curvature, "parameters are sharded")
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
