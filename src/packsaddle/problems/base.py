"""Objectives whose saddles, spectra and constants are known in closed form, to try theorems and certificates on.

Each is a differentiable function of a flat vector x, float[d], with its gradient in closed form, its critical points
with the smallest eigenvalue of the Hessian there, and its constants L and rho on the ball ||x||^2 <= `ball`.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CriticalPoint:
    """A point where the gradient vanishes."""

    x: Tensor  # float64[d]
    lambda_min: float  # the smallest eigenvalue of the Hessian at x
    index: int  # how many eigenvalues are negative


class Problem(ABC):
    """An objective f on R^d. `d` is its dimension."""

    d: int

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x), a scalar, differentiable; x is float[d]."""

    @abstractmethod
    def gradient(self, x: Tensor) -> Tensor:
        """Return grad f(x), float[d], in closed form."""

    @abstractmethod
    def critical_points(self) -> list[CriticalPoint]:
        """Return critical points: all of them up to symmetry where they are isolated and few, else examples."""

    @abstractmethod
    def constants(self, ball: float) -> tuple[float, float]:
        """Return (L, rho): Lipschitz constants of gradient and Hessian on ||x||^2 <= ball."""
