"""The interface of Hessian-vector products, of which there are two kinds: `double_backward` and `differences`."""

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from packsaddle.curvature.mean_loss import MeanLoss

# Distance from x, to each side along a unit vector v, over which the change of H v is measured. It gives an estimate of
# the Hessian's Lipschitz constant.
RHO_DISTANCE = 1e-2


def spare_of(d: int) -> float:
    """Return the factor by which a measured rounding error of d numbers is enlarged: the norm of a few rounding errors
    says little of the norm of other ones."""
    return 1 + 3 / math.sqrt(d)


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

    def __init__(self, curvature: MeanLoss) -> None:
        self.curvature = curvature

    @abstractmethod
    def over(self, part: MeanLoss) -> Self:
        """Return products by the same method over a part of the examples."""

    @abstractmethod
    def continue_from(self, other: "Products") -> None:
        """Take over what was measured for products by the same method over a sample of the examples: the step size, or
        the rounding error. It is not measured again for the first product."""

    def for_proof(self, v: Tensor) -> tuple[Tensor, float]:
        """Return the product H v for a direction v that was found on a sample, and its error. An error that was
        measured on the sample may stand for it."""
        return self.checked(v)

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
