"""Phase retrieval, tensor decomposition, and two functions of two variables: a curved valley and a monkey saddle."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lab.paper.problems.base import CriticalPoint, Problem


@dataclass(frozen=True)
class PhaseRetrieval(Problem):
    """The population loss of phase retrieval, f = E((a^T x)^2 - (a^T z)^2)^2 / 4 for Gaussian a and z = scale e_1.

    x has d coordinates (Sun et al. 2016). The critical points are 0, a maximum with lambda_min = -3 ||z||^2; all x
    orthogonal to z with ||x||^2 = ||z||^2 / 3, which are saddles with lambda_min = -2 ||z||^2; and the minima +-z.

    >>> from lab.paper.problems import PhaseRetrieval
    >>> [(point.index, round(point.lambda_min, 3)) for point in PhaseRetrieval(3).critical_points()]
    [(3, -3.0), (0, 2.0), (1, -2.0)]
    """

    d: int
    scale: float = 1.0

    def _z(self, x: Tensor) -> Tensor:
        return self.scale * torch.eye(self.d, dtype=x.dtype)[0]

    def __call__(self, x: Tensor) -> Tensor:
        z = self._z(x)
        xx, zz, xz = x.square().sum(), z.square().sum(), x @ z
        return (3 * xx**2 + 3 * zz**2 - 2 * xx * zz - 4 * xz**2) / 4

    def gradient(self, x: Tensor) -> Tensor:
        z = self._z(x)
        return 3 * x.square().sum() * x - z.square().sum() * x - 2 * (z @ x) * z

    def critical_points(self) -> list[CriticalPoint]:
        z2, e = self.scale**2, torch.eye(self.d, dtype=torch.float64)
        points = [CriticalPoint(0 * e[0], -3 * z2, self.d), CriticalPoint(self.scale * e[0], 2 * z2, 0)]
        return [*points, CriticalPoint(self.scale / math.sqrt(3) * e[1], -2 * z2, 1)] if self.d > 1 else points

    def constants(self, ball: float) -> tuple[float, float]:
        return max(9 * ball, 3 * self.scale**2), 18 * math.sqrt(ball)


@dataclass(frozen=True)
class OrthogonalTensor(Problem):
    """An orthogonal fourth-order tensor, unconstrained: f = beta / 4 (||x||^2 - 1)^2 - sum_i x_i^4 / 4, beta > 1.

    Ge et al. (2015) decompose it on the sphere. Raises ValueError if beta <= 1. The critical points are 0, and every x
    with m nonzero coordinates of equal magnitude a, where a^2 = beta / (beta m - 1). The 2 d points with m = 1 are the
    minima; the rest are exponentially many saddles of index m - 1 with lambda_min = -2 beta / (beta m - 1).

    >>> from lab.paper.problems import OrthogonalTensor
    >>> [(point.index, round(point.lambda_min, 3)) for point in OrthogonalTensor(3).critical_points()]
    [(3, -2.0), (0, 2.0), (1, -1.333), (2, -0.8)]
    """

    d: int
    beta: float = 2.0

    def __post_init__(self) -> None:
        if not self.beta > 1:
            raise ValueError(f"beta of OrthogonalTensor must be above 1, got {self.beta}")

    def __call__(self, x: Tensor) -> Tensor:
        return self.beta / 4 * (x.square().sum() - 1) ** 2 - (x**4).sum() / 4

    def gradient(self, x: Tensor) -> Tensor:
        return self.beta * (x.square().sum() - 1) * x - x**3

    def critical_points(self) -> list[CriticalPoint]:
        points = [CriticalPoint(torch.zeros(self.d, dtype=torch.float64), -self.beta, self.d)]
        for m in range(1, self.d + 1):
            a2 = self.beta / (self.beta * m - 1)
            x = torch.zeros(self.d, dtype=torch.float64)
            x[:m] = math.sqrt(a2)
            # Eigenvalues of the Hessian: a^2 = beta (m a^2 - 1) along each zero coordinate of x, 2 beta along x, and
            # -2 a^2 along directions within the nonzero coordinates that are orthogonal to x.
            curvatures = [2 * self.beta, *([-2 * a2] if m > 1 else []), *([a2] if m < self.d else [])]
            points.append(CriticalPoint(x, min(curvatures), m - 1))
        return points

    def constants(self, ball: float) -> tuple[float, float]:
        beta = self.beta
        return max(3 * beta * ball - beta, beta + max(0.0, 3 - beta) * ball, beta), 6 * (beta + 1) * math.sqrt(ball)


@dataclass(frozen=True)
class CurvedValley(Problem):
    """A saddle at 0 between two minima (+-1, 1) in a curved valley: f = (x^2 - 1)^2 / 4 + b (y - x^2)^2 / 2, d = 2.

    >>> from lab.paper.problems import CurvedValley
    >>> [(point.index, round(point.lambda_min, 3)) for point in CurvedValley().critical_points()]
    [(1, -1.0), (0, 0.376)]
    """

    b: float = 5.0
    d: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        return (x[0] ** 2 - 1) ** 2 / 4 + self.b / 2 * (x[1] - x[0] ** 2) ** 2

    def gradient(self, x: Tensor) -> Tensor:
        gap = x[1] - x[0] ** 2
        return torch.stack([x[0] * (x[0] ** 2 - 1) - 2 * self.b * x[0] * gap, self.b * gap])

    def critical_points(self) -> list[CriticalPoint]:
        minimum = torch.tensor([1.0, 1.0], dtype=torch.float64)
        trace, determinant = 2 + 5 * self.b, 2 * self.b
        lowest = (trace - math.sqrt(trace**2 - 4 * determinant)) / 2
        return [CriticalPoint(0 * minimum, -1.0, 1), CriticalPoint(minimum, lowest, 0)]

    def constants(self, ball: float) -> tuple[float, float]:
        """Return the Frobenius norms of entrywise bounds on the second and third derivatives, for |x|, |y| <= r.

        r is the root of `ball`.
        """
        r, b = math.sqrt(ball), self.b
        second = math.hypot(3 * ball + 1 + 2 * b * r + 6 * b * ball, 2 * b * r, 2 * b * r, b)
        return second, math.hypot(6 * r + 12 * b * r, *(3 * [2 * b]))


@dataclass(frozen=True)
class MonkeySaddle(Problem):
    """The monkey saddle, f = x^3 - 3 x y^2 + (x^2 + y^2)^2 / 4 with d = 2: gradient and Hessian vanish at 0.

    So 0 is second-order stationary. The problem is a negative control: a certificate must accept 0, although it is no
    minimum. The minima have distance 3 from 0, and f = -6.75.

    >>> import torch
    >>> from lab.paper.problems import MonkeySaddle
    >>> f = MonkeySaddle()
    >>> f.gradient(torch.zeros(2, dtype=torch.float64)).norm()
    tensor(0., dtype=torch.float64)
    >>> f.critical_points()[0].lambda_min
    0.0
    """

    d: int = 2

    def __call__(self, x: Tensor) -> Tensor:
        return x[0] ** 3 - 3 * x[0] * x[1] ** 2 + x.square().sum() ** 2 / 4

    def gradient(self, x: Tensor) -> Tensor:
        cubic = torch.stack([3 * x[0] ** 2 - 3 * x[1] ** 2, -6 * x[0] * x[1]])
        return cubic + x.square().sum() * x

    def critical_points(self) -> list[CriticalPoint]:
        zero = torch.zeros(2, dtype=torch.float64)
        return [CriticalPoint(zero, 0.0, 0), CriticalPoint(zero + torch.tensor([-3.0, 0.0]), 9.0, 0)]

    def constants(self, ball: float) -> tuple[float, float]:
        r = math.sqrt(ball)
        return 6 * r + 3 * ball, 6 + 6 * r
