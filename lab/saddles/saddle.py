"""A saddle of known spectrum, whose parameter is a matrix, so that Muon is defined on it.

The objective of W, float[n, n], has one saddle, W = 0, and two minima, W = V and W = -V, with ||V|| = 1:

    f(W) = ||W - s V||^2 / 2 + GAMMA (s^4 / 4 - s^2 / 2),  s = <V, W>

Its Hessian at 0 has the eigenvalue -GAMMA once, along V, and 1 otherwise, for every dimension d = n^2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

GAMMA = 0.25
DEPTH = GAMMA / 4  # f(0) - f(V)


@dataclass(frozen=True)
class Kind:
    """A direction of escape and the noise of stochastic gradients.

    The norm of the noise is 1 for every d, or grows with d if each coordinate has the same noise.
    """

    rank_one: bool = False  # V is an outer product of two Gaussian vectors, else a Gaussian matrix
    quiet: bool = False  # no noise along V: only the optimizer itself can create a component along V
    per_coordinate: float | None = None  # standard deviation of each coordinate; None: the norm of the noise is 1

    def deviation(self, n: int) -> float:
        """Return the standard deviation of one coordinate of the noise."""
        return 1 / n if self.per_coordinate is None else self.per_coordinate


KINDS = {
    "noise of norm 1": Kind(),
    "noise of norm 1, V of rank one": Kind(rank_one=True),
    "noise of norm 1, none along V": Kind(quiet=True),
    "noise of 1/8 per coordinate": Kind(rank_one=True, per_coordinate=1 / 8),
}


@dataclass(frozen=True)
class Saddle:
    """The objective and its stochastic gradients for one seed."""

    n: int  # side of W
    kind: str  # a key of KINDS
    seed: int

    def direction(self) -> Tensor:
        """Return V, float[n, n], of norm 1."""
        rng = torch.Generator().manual_seed(self.seed)
        u, v = torch.randn(2, self.n, generator=rng)
        full = torch.outer(u, v) if KINDS[self.kind].rank_one else torch.randn(self.n, self.n, generator=rng)
        return full / full.norm()

    def gradients(self, worker: int, workers: int = 1) -> Callable[[Tensor], tuple[float, float, Tensor]]:
        """Return a function of W with s, f(W) and the next stochastic gradient, float[n, n], a mean over `workers`."""
        kind, v = KINDS[self.kind], self.direction()
        rng = torch.Generator().manual_seed(1_000 * (self.seed + 1) + worker)
        deviation = kind.deviation(self.n) / math.sqrt(workers)

        def gradient(w: Tensor) -> tuple[float, float, Tensor]:
            s = float((v * w).sum())
            noise = torch.randn(self.n, self.n, generator=rng).mul_(deviation)
            if kind.quiet:
                noise.sub_(v, alpha=float((v * noise).sum()))
            value = 0.5 * (float(w.square().sum()) - s * s) + GAMMA * (s**4 / 4 - s * s / 2)
            return s, value, noise.add_(w).add_(v, alpha=GAMMA * (s**3 - s) - s)

        return gradient


class Objective(nn.Module):
    """f as a module of W, for `packsaddle.certify`; its input is V."""

    def __init__(self, w: Tensor) -> None:
        super().__init__()
        self.w = nn.Parameter(w.detach().clone())

    def forward(self, v: Tensor) -> Tensor:
        """Return f(W), a scalar."""
        s = (v * self.w).sum()
        return 0.5 * (self.w - s * v).square().sum() + GAMMA * (s**4 / 4 - s**2 / 2)
