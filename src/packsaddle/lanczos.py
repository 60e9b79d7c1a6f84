"""Extreme eigenvalues of a symmetric matrix known by its products: bounds on both sides, with a failure probability.

A Ritz value bounds lambda_min from above, always. From below nothing does for a fixed start; for a uniformly random
start Kuczynski and Wozniakowski (1992, Theorem 3) bound the error after k steps on a positive semidefinite A:
P(lambda_max - theta > s lambda_max) <= 1.648 sqrt(n) exp(-sqrt(s) (2 k - 1)). Krylov spaces do not change under shifts,
so it holds for A - lambda_min I and lambda_max I - A together, each with half the probability; with
g = lambda_max - lambda_min <= (theta_max - theta_min) / (1 - 2 s) this gives

    lambda_min >= theta_min - s (theta_max - theta_min) / (1 - 2 s)      if s < 1 / 2.

Whoever stops when the bound suffices has looked at every step, so step k is given the share delta / (k (k + 1)) of the
failure probability; these sum to delta.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Ritz:
    """What k steps know of a symmetric n x n matrix A."""

    n: int
    steps: int  # k, products with A so far
    theta_min: float  # lambda_min <= theta_min
    theta_max: float  # lambda_max >= theta_max
    residual: float  # ||A v - theta_min v|| for the Ritz vector v of theta_min
    exhausted: bool  # the Krylov space is invariant: theta_min and theta_max are eigenvalues, to rounding
    basis: tuple[Tensor, ...]  # k orthonormal vectors, float64[n]
    weights: Tensor  # float64[k], v in that basis

    def vector(self) -> Tensor:
        """Return the unit Ritz vector v of theta_min, float64[n]."""
        v = torch.zeros_like(self.basis[0])
        for weight, q in zip(self.weights.tolist(), self.basis, strict=True):
            v.add_(q, alpha=weight)
        unit: Tensor = v / v.norm()
        return unit

    def lower_bound(self, failure_probability: float) -> float:
        """Return a lower bound on lambda_min that holds at every step at once but with this probability; -inf if
        k steps say nothing yet. Raises ValueError unless the probability is in (0, 1)."""
        if not 0 < failure_probability < 1:
            raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability}")
        spread = self.theta_max - self.theta_min
        if self.exhausted:
            return self.theta_min - _rounding(self.n) * max(abs(self.theta_min), abs(self.theta_max))
        share = failure_probability / (self.steps * (self.steps + 1))
        s = (math.log(1.648 * math.sqrt(self.n) * 2 / share) / (2 * self.steps - 1)) ** 2
        return self.theta_min - s * spread / (1 - 2 * s) if s < 0.5 else -math.inf


def lanczos(matvec: Callable[[Tensor], Tensor], n: int, generator: torch.Generator) -> Iterator[Ritz]:
    """Yield what is known after 1, 2, ... products, until the Krylov space is exhausted.

    `matvec` maps float64[n] to A v, float64[n], for a symmetric A. The start is uniform on the sphere, from
    `generator`, which must be fresh for every certificate (and the same on every worker). Recurrences are in double
    precision with full reorthogonalisation, twice, since the bound supposes exact arithmetic.
    """
    q = torch.randn(n, generator=generator, dtype=torch.float64, device=generator.device)
    basis = [q / q.norm()]
    alphas: list[float] = []
    betas: list[float] = []
    while True:
        w = matvec(basis[-1])
        alphas.append(float(w @ basis[-1]))
        for _ in range(2):
            for p in basis:
                w = w - (w @ p) * p
        beta = float(w.norm())
        tridiagonal = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        if betas:
            off = torch.diag(torch.tensor(betas, dtype=torch.float64), 1)
            tridiagonal = tridiagonal + off + off.T
        thetas, vectors = torch.linalg.eigh(tridiagonal)
        scale = max(abs(float(thetas[0])), abs(float(thetas[-1])), beta)
        exhausted = len(basis) == n or beta <= _rounding(n) * scale
        residual = beta * abs(float(vectors[-1, 0]))
        yield Ritz(n, len(basis), float(thetas[0]), float(thetas[-1]), residual, exhausted, tuple(basis), vectors[:, 0])
        if exhausted:
            return
        betas.append(beta)
        basis.append(w / beta)


def _rounding(n: int) -> float:
    """Relative rounding of sums of n doubles, with room."""
    return 8 * math.sqrt(n) * torch.finfo(torch.float64).eps
