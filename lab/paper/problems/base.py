"""Objectives whose saddles, spectra and constants are known in closed form, to test theorems and certificates.

Each is a differentiable function of a flat vector x, float[d], with its gradient in closed form, its critical points
with the smallest eigenvalue of the Hessian there, and its constants L and rho on the ball ||x||^2 <= `ball`. `Oracle`
returns each worker's stochastic gradients of any problem, as the paper assumes them.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.numerics import Stream, generator


@dataclass(frozen=True)
class CriticalPoint:
    """A point where the gradient vanishes.

    >>> from lab.paper.problems import QuadraticQuartic
    >>> [(point.index, point.lambda_min) for point in QuadraticQuartic(3).critical_points()]
    [(1, -1.0), (0, 1.0)]
    """

    x: Tensor  # float64[d]
    lambda_min: float  # the smallest eigenvalue of the Hessian at x
    index: int  # number of negative eigenvalues of the Hessian at x


class Problem(ABC):
    """The objective f on R^d of a test problem, with its derivatives in closed form.

    >>> import torch
    >>> from lab.paper.problems import Problem, QuadraticQuartic
    >>> f = QuadraticQuartic(3)
    >>> isinstance(f, Problem), f.d
    (True, 3)
    >>> x = torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64)
    >>> f(x), f.gradient(x)
    (tensor(-0.1094, dtype=torch.float64), tensor([-0.3750,  0.0000,  0.0000], dtype=torch.float64))
    >>> f.constants(1.0)
    (2.0, 6.0)
    """

    d: int  # the dimension of x

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Return f(x), a scalar, differentiable; x is float[d]."""

    @abstractmethod
    def gradient(self, x: Tensor) -> Tensor:
        """Return grad f(x), float[d], in closed form."""

    @abstractmethod
    def critical_points(self) -> list[CriticalPoint]:
        """Return critical points of f.

        If they are isolated and few, these are all critical points up to symmetry; otherwise they are examples.
        """

    @abstractmethod
    def constants(self, ball: float) -> tuple[float, float]:
        """Return (L, rho): Lipschitz constants of gradient and Hessian on ||x||^2 <= ball."""


@dataclass(frozen=True)
class Oracle:
    """The stochastic gradient oracle of a problem, grad F_i(x, theta_t) = grad f(x) + b_i + noise (Assumption B).

    It is unbiased for f_i = f + <b_i, x>, whose mean over workers is f. The noise is Gaussian with E||noise||^2 =
    sigma^2 (Assumption B with equality). It does not depend on x, so Assumption C holds with the constant L of f; with
    `lipschitz=False` each noise is multiplied by sign(sin(x_1 / 1e-3)), which keeps mean and variance and breaks
    Assumption C. The first `quiet` coordinates have no noise, so a saddle with negative curvature only along them can
    be left by the artificial noise xi_t only. The norm of b_i is `heterogeneity`, and sum_i b_i = 0. Raises ValueError
    unless some coordinate has noise.

    >>> import torch
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> oracle = Oracle(Quadratic((1.0, -1.0)), sigma=0.1, workers=2)
    >>> x = torch.zeros(2, dtype=torch.float64)
    >>> oracle.gradient(x, step=0, worker=1).shape
    torch.Size([2])
    >>> torch.equal(oracle.gradient(x, step=0), oracle.gradient(x, step=0))
    True
    """

    problem: Problem  # f
    sigma: float = 0.0  # root of E||noise||^2
    lipschitz: bool = True  # True: the stochastic gradients satisfy Assumption C
    heterogeneity: float = 0.0  # ||b_i||
    workers: int = 1  # W
    seed: int = 0  # seed of the noise and of b_i
    quiet: int = 0  # number of leading coordinates without noise, less than d

    def __post_init__(self) -> None:
        if not 0 <= self.quiet < self.problem.d:
            raise ValueError(f"quiet of Oracle must be 0 or more and below d = {self.problem.d}, got {self.quiet}")

    def gradient(self, x: Tensor, *, step: int, worker: int = 0) -> Tensor:
        """Return a worker's stochastic gradient at x, float[d], a pure function of (x, seed, step, worker)."""
        rng = generator(self.seed, step, Stream.BATCH, worker=worker)
        noise: Tensor = torch.randn(len(x), generator=rng, dtype=x.dtype) * (self.sigma / (len(x) - self.quiet) ** 0.5)
        noise[: self.quiet] = 0.0
        if not self.lipschitz:
            noise = noise * torch.where(torch.sin(x[0] / 1e-3) >= 0, 1.0, -1.0)
        return self.problem.gradient(x) + noise + self._shift(worker, x)

    def _shift(self, worker: int, x: Tensor) -> Tensor:
        """Return b_i for worker i, float[d]: opposite vectors for each pair of workers.

        If the number of workers is odd, the last worker's vector is 0.
        """
        if (worker == self.workers - 1 and self.workers % 2) or not self.heterogeneity:
            return torch.zeros_like(x)
        b: Tensor = torch.randn(
            len(x), generator=generator(self.seed, 0, Stream.SHARD, worker=worker // 2), dtype=x.dtype
        )
        return b.mul_(self.heterogeneity / float(b.norm()) * (1 if worker % 2 else -1))
