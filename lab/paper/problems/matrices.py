"""Matrix problems: principal components, factorisation, sensing, completion, deep linear networks."""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from lab.paper.problems.base import CriticalPoint, Problem
from packsaddle.numerics import Stream, generator


@dataclass(frozen=True)
class RankOnePCA(Problem):
    """Principal component analysis of rank 1, a chain of ordered saddles: f = ||x x^T - diag(eigenvalues)||_F^2 / 4.

    Eigenvalues are decreasing and positive. Critical: 0 with lambda_min = -lambda_1, and +-sqrt(lambda_i) e_i with
    eigenvalues 2 lambda_i and lambda_i - lambda_j.

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

    There are no spurious minima (Ge et al. 2017), and the saddles are V_S Lambda_S^(1/2). Eigenvalues decreasing and
    positive. A critical point that keeps the set S of eigenvalues has lambda_min = 2 (min S - max of the rest) if |S| =
    rank and that is negative, and -2 max of the rest if |S| < rank; minima keep the largest, with zero eigenvalues
    along rotations.

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
        """Eigenvalues along new directions: 2 (lambda_s - lambda_j) for kept s and dropped j, and -2 lambda_j
        for dropped j and every idle column; a negative one among kept pairs does not occur."""
        rest = [value for i, value in enumerate(self.eigenvalues) if i not in chosen]
        along = [2 * (self.eigenvalues[s] - value) for s in chosen for value in rest]
        along += [-2 * value for value in rest for _ in range(self.rank - len(chosen))]
        negative = [value for value in along if value < 0]
        # Rotations of the columns leave f alone; with one column there are none.
        flat = 0.0 if self.rank > 1 else min([*along, *(4 * self.eigenvalues[s] for s in chosen)])
        return min([flat, *along]) if negative else max(0.0, flat), len(negative)

    def constants(self, ball: float) -> tuple[float, float]:
        gamma = max(ball, self.eigenvalues[0])
        return 6 * gamma, 12 * math.sqrt(gamma)


@dataclass(frozen=True)
class MatrixSensing(Problem):
    """Matrix sensing and completion, f = sum_m (<A_m, U U^T> - <A_m, M>)^2 / (2 samples), U of n x rank.

    M = diag(eigenvalues) is n x n. A function of `seed`, A_m are symmetrised Gaussian matrices (`kind="sensing"`; E <A,
    X>^2 = ||X||_F^2 for symmetric X), or pick single entries with weight n (`kind="completion"`, entries drawn
    uniformly). 0 is a saddle whose Hessian is that of -2 sum_m <A_m, M> A_m / samples, once per column; U = V
    Lambda^(1/2) is a global minimum where rank is enough.

    >>> import torch
    >>> from lab.paper.problems import MatrixSensing
    >>> f = MatrixSensing((2.0, 1.0), rank=1, samples=8)
    >>> f.d, f.gradient(torch.zeros(2, dtype=torch.float64)).norm()
    (2, tensor(0., dtype=torch.float64))
    """

    eigenvalues: tuple[float, ...]
    rank: int
    samples: int
    kind: str = "sensing"
    seed: int = 0

    @property
    def d(self) -> int:  # type: ignore[override]
        """The dimension of x."""
        return len(self.eigenvalues) * self.rank

    def _measurements(self, dtype: torch.dtype) -> Tensor:
        """A_1 ... A_samples, float[samples, n, n], symmetric."""
        n, rng = len(self.eigenvalues), generator(self.seed, 0, Stream.INIT)
        if self.kind == "sensing":
            a = torch.randn(self.samples, n, n, generator=rng, dtype=torch.float64)
        else:
            a = torch.zeros(self.samples, n * n, dtype=torch.float64)
            a[torch.arange(self.samples), torch.randint(n * n, (self.samples,), generator=rng)] = float(n)
            a = a.view(-1, n, n)
        return ((a + a.transpose(1, 2)) / 2).to(dtype)

    def _residual(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u, a = x.view(-1, self.rank), self._measurements(x.dtype)
        gap = u @ u.T - torch.diag(torch.tensor(self.eigenvalues, dtype=x.dtype))
        return u, a, (a * gap).sum((1, 2))

    def __call__(self, x: Tensor) -> Tensor:
        return self._residual(x)[2].square().sum() / (2 * self.samples)

    def gradient(self, x: Tensor) -> Tensor:
        u, a, residual = self._residual(x)
        return (2 * torch.einsum("m,mij->ij", residual, a) @ u / self.samples).view(-1)

    def critical_points(self) -> list[CriticalPoint]:
        zero = torch.zeros(self.d, dtype=torch.float64)
        _, a, residual = self._residual(zero)
        curvatures = torch.linalg.eigvalsh(2 * torch.einsum("m,mij->ij", residual, a) / self.samples)
        return [CriticalPoint(zero, float(curvatures[0]), int((curvatures < 0).sum()) * self.rank)]

    def constants(self, ball: float) -> tuple[float, float]:
        """L = B (6 ball + 2 ||M||_F) and rho = 12 B sqrt(ball) with B the mean of ||A_m||_F^2."""
        b = float(torch.linalg.matrix_norm(self._measurements(torch.float64)).square().mean())
        return b * (6 * ball + 2 * math.hypot(*self.eigenvalues)), 12 * b * math.sqrt(ball)


@dataclass(frozen=True)
class DeepLinear(Problem):
    """A deep linear network on whitened data, f = ||W_depth ... W_1 - diag(targets)||_F^2 / 2 for square matrices.

    (Kawaguchi 2016.) 0 is critical; for depth 2 it is a strict saddle with lambda_min = -max target, for depth >= 3 its
    Hessian vanishes, a saddle that second-order information does not show.

    >>> from lab.paper.problems import DeepLinear
    >>> f = DeepLinear((2.0, 1.0))
    >>> f.d, f.critical_points()[0].lambda_min
    (8, -2.0)
    """

    targets: tuple[float, ...]
    depth: int = 2

    @property
    def d(self) -> int:  # type: ignore[override]
        """The dimension of x."""
        return self.depth * len(self.targets) ** 2

    def _product(self, ws: list[Tensor], like: Tensor) -> Tensor:
        result = torch.eye(len(self.targets), dtype=like.dtype)
        for w in ws:
            result = w @ result
        return result

    def _layers(self, x: Tensor) -> list[Tensor]:
        n = len(self.targets)
        return list(x.view(self.depth, n, n).unbind(0))

    def _gap(self, x: Tensor) -> Tensor:
        return self._product(self._layers(x), x) - torch.diag(torch.tensor(self.targets, dtype=x.dtype))

    def __call__(self, x: Tensor) -> Tensor:
        return self._gap(x).square().sum() / 2

    def gradient(self, x: Tensor) -> Tensor:
        ws, gap = self._layers(x), self._gap(x)
        grads = [self._product(ws[i + 1 :], x).T @ gap @ self._product(ws[:i], x).T for i in range(self.depth)]
        return torch.stack(grads).view(-1)

    def critical_points(self) -> list[CriticalPoint]:
        n = len(self.targets)
        zero = torch.zeros(self.d, dtype=torch.float64)
        balanced = torch.diag(torch.tensor(self.targets, dtype=torch.float64) ** (1 / self.depth)).repeat(
            self.depth, 1, 1
        )
        saddle = CriticalPoint(zero, -max(self.targets), n * n) if self.depth == 2 else CriticalPoint(zero, 0.0, 0)
        return [saddle, CriticalPoint(balanced.reshape(-1), 0.0, 0)]

    def constants(self, ball: float) -> tuple[float, float]:
        """From products of norms at most b = sqrt(ball): crude bounds, of the right power in the ball."""
        b, k, m = math.sqrt(ball), self.depth, math.hypot(*self.targets)
        first, second, third = (math.perm(k, j) * b ** max(k - j, 0) for j in (1, 2, 3))
        gap = b**k + m
        return first**2 + gap * second, 3 * first * second + gap * third
