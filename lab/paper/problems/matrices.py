"""Matrix problems: principal component analysis of rank 1, and symmetric low-rank factorization."""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lab.paper.problems.base import CriticalPoint, Problem


@dataclass(frozen=True)
class RankOnePCA(Problem):
    """Principal component analysis of rank 1, a chain of ordered saddles: f = ||x x^T - diag(eigenvalues)||_F^2 / 4.

    `eigenvalues` are lambda_1 > lambda_2 > ... > 0. The critical points are 0 with lambda_min = -lambda_1, and
    +-sqrt(lambda_i) e_i, where the Hessian has the eigenvalues 2 lambda_i and lambda_i - lambda_j for all j != i.

    >>> from lab.paper.problems import RankOnePCA
    >>> [(point.index, round(point.lambda_min, 3)) for point in RankOnePCA((2.0, 1.0)).critical_points()]
    [(2, -2.0), (0, 1.0), (1, -1.0)]
    """

    eigenvalues: tuple[float, ...]

    @property
    def d(self) -> int:  # type: ignore[override]
        """The dimension of x."""
        return len(self.eigenvalues)

    def _matrix(self, x: Tensor) -> Tensor:
        return torch.tensor(self.eigenvalues, dtype=x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        lam = self._matrix(x)
        return (x.square().sum() ** 2 - 2 * (lam * x**2).sum() + lam.square().sum()) / 4

    def gradient(self, x: Tensor) -> Tensor:
        return x.square().sum() * x - self._matrix(x) * x

    def critical_points(self) -> list[CriticalPoint]:
        lam = self.eigenvalues
        points = [CriticalPoint(torch.zeros(self.d, dtype=torch.float64), -max(lam), self.d)]
        for i, li in enumerate(lam):
            others = [li - lj for j, lj in enumerate(lam) if j != i]
            x = torch.zeros(self.d, dtype=torch.float64)
            x[i] = math.sqrt(li)
            points.append(CriticalPoint(x, min([2 * li, *others]), sum(o < 0 for o in others)))
        return points

    def constants(self, ball: float) -> tuple[float, float]:
        return max(3 * ball, *self.eigenvalues), 6 * math.sqrt(ball)


@dataclass(frozen=True)
class MatrixFactorisation(Problem):
    """Symmetric low-rank factorisation, f = ||U U^T - diag(eigenvalues)||_F^2 / 2 over U, n x rank.

    `eigenvalues` must be decreasing and positive. There are no spurious minima (Ge et al. 2017). A critical point
    V_S Lambda_S^(1/2) keeps a set S of the eigenvalues; the minima keep the largest ones, and have zero curvature along
    rotations of the columns. A saddle has lambda_min = 2 (min S - max of the dropped) if |S| = rank, and lambda_min =
    -2 (max of the dropped) if |S| < rank.

    >>> from lab.paper.problems import MatrixFactorisation
    >>> f = MatrixFactorisation((2.0, 1.0), rank=1)
    >>> [(point.index, round(point.lambda_min, 3)) for point in f.critical_points()]
    [(2, -4.0), (1, -2.0), (0, 2.0)]
    """

    eigenvalues: tuple[float, ...]
    rank: int

    @property
    def d(self) -> int:  # type: ignore[override]
        """The dimension of x."""
        return len(self.eigenvalues) * self.rank

    def _residual(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = x.view(-1, self.rank)
        return u, u @ u.T - torch.diag(torch.tensor(self.eigenvalues, dtype=x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return self._residual(x)[1].square().sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        u, residual = self._residual(x)
        return 2 * (residual @ u).view(-1)

    def critical_points(self) -> list[CriticalPoint]:
        n, points = len(self.eigenvalues), []
        for kept in product((False, True), repeat=n):
            chosen = [i for i in range(n) if kept[i]]
            if len(chosen) > self.rank:
                continue
            u = torch.zeros(n, self.rank, dtype=torch.float64)
            for column, i in enumerate(chosen):
                u[i, column] = math.sqrt(self.eigenvalues[i])
            points.append(CriticalPoint(u.view(-1), *self._curvature(chosen)))
        return points

    def _curvature(self, chosen: list[int]) -> tuple[float, int]:
        """Return the smallest eigenvalue of the Hessian where U keeps the `chosen` eigenvalues, and the number of
        negative ones.

        The eigenvalues toward a dropped eigenvector j are 2 (lambda_s - lambda_j) for each kept s, and -2 lambda_j for
        each zero column of U. Those among kept eigenvectors are never negative.
        """
        rest = [value for i, value in enumerate(self.eigenvalues) if i not in chosen]
        along = [2 * (self.eigenvalues[s] - value) for s in chosen for value in rest]
        along += [-2 * value for value in rest for _ in range(self.rank - len(chosen))]
        negative = [value for value in along if value < 0]
        # Rotations of the columns of U do not change f, so the Hessian has an eigenvalue 0, unless there is one column.
        flat = 0.0 if self.rank > 1 else min([*along, *(4 * self.eigenvalues[s] for s in chosen)])
        return min([flat, *along]) if negative else max(0.0, flat), len(negative)

    def constants(self, ball: float) -> tuple[float, float]:
        gamma = max(ball, self.eigenvalues[0])
        return 6 * gamma, 12 * math.sqrt(gamma)
