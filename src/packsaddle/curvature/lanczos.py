"""Extreme eigenvalues of a symmetric matrix known by its products: bounds on both sides, with a failure probability.

A Ritz value bounds lambda_min from above, always. From below nothing does for a fixed start. For a start b that is
uniform on the sphere, write p_j for the Lanczos polynomials, q_j = p_j(A) b. If v is a unit eigenvector of lambda_min,
<q_j, v> = p_j(lambda_min) <b, v>, and the q_j are orthonormal, so by Bessel's inequality

    <b, v>^2 sum_{j <= k} p_j(lambda_min)^2 <= 1,

while <b, v>^2 has a Beta(1/2, (n - 1)/2) law: it is below its delta-quantile w with probability delta. Below the
smallest Ritz value the sum grows as lambda falls, so with probability 1 - delta

    lambda_min >= the lambda at which sum_{j <= k} p_j(lambda)^2 = 1 / w.

The Lanczos polynomials of -A from b are p_j turned about 0, so that the same bound of -A is an upper one on lambda_max.
(van Dorsselaer, Hochstenbach and van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000, use the last polynomial alone; the
sum is never worse. Kuczynski and Wozniakowski's bound of 1992 supposes the worst of all spectra instead of the one that
was met, and is weaker.) The event is the same for every k, so whoever stops when the bound suffices pays nothing.

Products that round, as in single precision, leave noise where the process would end. Once a beta is no more than that,
the next vector is noise too, so betas are taken as no smaller than `Ritz.rounding`. It is measured, not supposed:
A q_k has no part along q_0 ... q_{k-2}, and beta_k along q_{k-1}; what is found there instead is the products' error.

Products that are wrong by a known tau, as differences of gradients are, are those of a matrix within tau of A if they
are linear, and its eigenvalues are within tau of A's (Weyl): `Ritz.rounding` is no less than tau, and both bounds are
moved by it. The lower bound supposes in addition that what is wrong does not depend on <b, v>, as rounding and the
third derivatives of a loss do not: an error that knew the start could hide v.

Without stored vectors orthogonality is lost to rounding, but each q_j still has norm 1, so p_j(lambda_min)^2 <= 1 / w
for each j alone: beyond the memory limit the largest term takes the place of the sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_EVALUATIONS = 100  # at most, of which a dozen are usual
_ROUNDING = 16  # of a product, in units of the last place of ||A||: roughly what long sums lose
_LEAST_PROBABILITY = 1e-100  # the quantile underflows some way below


@dataclass(frozen=True)
class Ritz:
    """The knowledge of k steps about a symmetric n x n matrix A."""

    n: int
    alphas: tuple[float, ...]  # k, the tridiagonal's diagonal
    betas: tuple[float, ...]  # k, off it; the last one is the norm of what the k-th step left over
    thetas: tuple[float, ...]  # k Ritz values in rising order
    shares: tuple[float, ...]  # k, how much of ||b||^2 = 1 lies along each Ritz vector
    residual: float  # ||A v - theta_min v|| for the Ritz vector v of theta_min
    rounding: float  # what products are wrong by along one direction, about
    exhausted: bool  # the Krylov space is invariant: Ritz values are eigenvalues, to rounding
    orthogonal: bool  # every vector was kept and used to reorthogonalise

    @property
    def steps(self) -> int:
        """k, products with A so far."""
        return len(self.alphas)

    @property
    def theta_min(self) -> float:
        """lambda_min is at most this (with `orthogonal`; otherwise ask for the Ritz vector's own quotient)."""
        return self.thetas[0]

    @property
    def theta_max(self) -> float:
        """lambda_max is at least this."""
        return self.thetas[-1]

    @property
    def is_settling(self) -> bool:
        """True if the Ritz vector of theta_min is nearly an eigenvector: a residual of a tenth of the curvature."""
        return self.residual <= 0.1 * abs(self.theta_min)

    def lower_bound(self, failure_probability: float) -> float:
        """Return a lower bound on lambda_min that holds, for all k at once, but with `failure_probability` over the
        start.

        Less `rounding`. Raises ValueError unless the probability is in [1e-100, 1).
        """
        check_probability(failure_probability)
        scale = max(abs(self.theta_min), abs(self.theta_max), self.betas[-1])
        if scale == 0.0 or self.n == 1:
            return self.theta_min - self.rounding
        from scipy.special import betaincinv  # slow to import, and only certificates need it

        limit = -math.log(float(betaincinv(0.5, (self.n - 1) / 2, failure_probability)))
        # In s = log(theta_min - lambda) each log p_j^2 is a sum of log(e^s + distance to a root), so the growth is
        # convex, and secants through points where it is above the limit end at one where it is, too, but for rounding.
        least, s = math.log(scale) - 45.0, math.log(scale) + limit
        before, last, back = s + 1.0, self._log_growth(self.theta_min - math.exp(s + 1.0), scale), 0.0
        for _ in range(_EVALUATIONS):
            growth = self._log_growth(self.theta_min - math.exp(s), scale)
            if growth < limit:
                back = 4 * back or 1e-15 * max(1.0, abs(s))
                s += back
                continue
            step = (growth - limit) * (before - s) / (last - growth) if growth < last else 0.0
            if back or s == least or step < 1e-15 * max(1.0, abs(s)):
                break
            before, last, s = s, growth, max(least, s - step)
        return self.theta_min - math.exp(s) - self.rounding

    def upper_bound(self, failure_probability: float) -> float:
        """Return an upper bound on lambda_max, with its own `failure_probability`: the lower bound of -A, turned."""
        turned = replace(
            self, alphas=tuple(-a for a in self.alphas), thetas=tuple(-theta for theta in reversed(self.thetas))
        )
        return -turned.lower_bound(failure_probability)

    def _log_growth(self, below: float, scale: float) -> float:
        """log of sum_j p_j(lambda)^2, or of its largest term, at a lambda below theta_min.

        -p_{j+1} / p_j = d_j / beta_{j+1} with the pivots d_j of the tridiagonal minus lambda, all positive there.
        """
        floor, least = max(self.rounding, _rounding(self.n) * scale), math.ulp(scale)
        pivot, term, total, before = 0.0, 0.0, 0.0, 0.0  # log p_j^2, and of the sum
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            pivot = alpha - below - (before * before / pivot if before else 0.0)
            pivot = pivot if pivot > least else least
            before = beta
            term += 2 * math.log(pivot / (beta if beta > floor else floor))
            low, high = (total, term) if total < term else (term, total)
            total = high + math.log1p(math.exp(low - high)) if self.orthogonal else high
        return total


class Lanczos:
    """The Lanczos process on a symmetric A, one product a `step`.

    `matvec` maps float64[n] to A v, float64[n]; `start`, float64[n], is Gaussian, fresh for every certificate (and the
    same on every worker); `precision` is the unit roundoff of the products, and `error` returns what one of a unit
    vector may be wrong by otherwise, as far as is known now. Vectors may be a worker's parts of longer ones, of `n`
    numbers in all, with a collective `dot`. Recurrences are in double precision; the first `max_vectors` vectors (None:
    all) are kept, and while they all are, each new one is orthogonalised against them twice. Beyond, three vectors are
    in memory and the rest is found again when a Ritz vector is asked for. Raises ValueError for `max_vectors` below 2.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        start: Tensor,
        *,
        max_vectors: int | None = None,
        precision: float = torch.finfo(torch.float64).eps,
        error: Callable[[], float] = lambda: 0.0,
        n: int | None = None,
        dot: Callable[[Tensor, Tensor], float] = lambda a, b: float(a @ b),
    ) -> None:
        if max_vectors is not None and max_vectors < 2:
            raise ValueError(f"max_vectors must be at least 2, got {max_vectors}")
        n = len(start) if n is None else n
        self._matvec, self._n, self._limit, self._precision = matvec, n, max_vectors or n, precision
        self._known_error, self._dot = error, dot
        self._error = 0.0  # the largest found of what should have been nothing
        self.products = 0  # all of them, also those for Ritz vectors
        self._basis = [start / self._norm(start)]
        self._pair = (torch.zeros(0), self._basis[0])  # the last two vectors
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._ends = torch.ones(1, 2, dtype=torch.float64)  # Ritz vectors of theta_min and theta_max in the basis

    @property
    def exhausted(self) -> bool:
        """True if no further step is possible."""
        return bool(self._betas) and self._betas[-1] == 0.0

    def step(self) -> Ritz:
        """Do one product and return what is known now. Raises RuntimeError after `exhausted`."""
        if self.exhausted:
            raise RuntimeError("the Krylov space is exhausted; there is no further step")

        # beta_{k+1} q_{k+1} = A q_k - alpha_k q_k - beta_k q_{k-1}, orthogonalised against all q_j that are kept.
        before, q = self._pair
        w = self._product(q)
        alpha = self._dot(w, q)
        w = self._recur(w, alpha, q, before)
        orthogonal = len(self._alphas) < self._limit
        if orthogonal:
            for sweep in range(2):
                for p in self._basis:
                    found = self._dot(w, p)
                    w.sub_(p, alpha=found)
                    if sweep == 0 and p is not q:  # along q it is alpha's own rounding
                        self._error = max(self._error, abs(found))
        self._alphas.append(alpha)
        beta = self._norm(w)

        # Ritz values: eigenvalues of the tridiagonal; the process ends where beta is rounding.
        thetas, vectors = torch.linalg.eigh(self._tridiagonal())
        self._ends = vectors[:, [0, -1]]
        scale = max(abs(float(thetas[0])), abs(float(thetas[-1])), beta)
        exhausted = len(self._alphas) == self._n or beta <= _rounding(self._n) * scale
        self._betas.append(0.0 if exhausted else beta)
        if not exhausted:
            self._pair = (q, w.div_(beta))
            if len(self._basis) < self._limit:
                self._basis.append(self._pair[1])

        # ||A v - theta_min v|| = beta |last component of theta_min's vector|.
        return Ritz(
            self._n,
            tuple(self._alphas),
            tuple(self._betas),
            tuple(thetas.tolist()),
            tuple(vectors[0].square().tolist()),
            beta * abs(float(vectors[-1, 0])),
            max(_ROUNDING * self._precision * scale, 2 * self._error, self._spread_error()),
            exhausted,
            orthogonal,
        )

    def run(
        self, most: int, is_enough: Callable[[Ritz], bool], progress: Callable[[int], None] = lambda steps: None
    ) -> Ritz:
        """Do steps until `is_enough`, `most` are done or none is possible; return what is known then.

        `progress` is called with the number of steps so far.
        """
        for k in range(1, most + 1):
            ritz = self.step()
            progress(k)
            if self.exhausted or is_enough(ritz):
                break
        return ritz

    def ritz_vector(self, *, largest: bool = False) -> Tensor:
        """Return the unit Ritz vector v of theta_min, or with `largest` of theta_max, float64[n]; vectors not kept cost
        one product each."""
        v = torch.zeros_like(self._basis[0])
        weights = self._ends[:, int(largest)].tolist()
        for weight, q in zip(weights, self._basis, strict=False):
            v.add_(q, alpha=weight)
        if len(weights) > len(self._basis):
            before, q = self._basis[-2:]
            for j in range(len(self._basis) - 1, len(weights) - 1):
                w = self._recur(self._product(q), self._alphas[j], q, before, j)
                before, q = q, w.div_(self._betas[j])
                v.add_(q, alpha=weights[j + 1])
        return v.div_(self._norm(v))

    def _spread_error(self) -> float:
        """The norm of n x k numbers whose columns are independent, with the norm of one product's error (Marchenko and
        Pastur): what k products' errors are as a matrix, hardly more than one's unless k is near n."""
        return self._known_error() * (1 + math.sqrt(len(self._alphas) / self._n))

    def _norm(self, v: Tensor) -> float:
        return math.sqrt(self._dot(v, v))

    def _product(self, q: Tensor) -> Tensor:
        self.products += 1
        return self._matvec(q)

    def _recur(self, product: Tensor, alpha: float, q: Tensor, before: Tensor, j: int | None = None) -> Tensor:
        """A q_j - alpha_j q_j - beta_j q_{j-1}; A q_j, which may be the caller's, stays as it is."""
        j = len(self._alphas) if j is None else j
        w = product.sub(q, alpha=alpha)
        return w.sub_(before, alpha=self._betas[j - 1]) if j else w

    def _tridiagonal(self) -> Tensor:
        off = torch.diag(torch.tensor(self._betas, dtype=torch.float64), 1)
        return torch.diag(torch.tensor(self._alphas, dtype=torch.float64)) + (off + off.T if self._betas else 0.0)


def check_probability(failure_probability: float) -> None:
    """Raise ValueError unless a failure probability can be worked with."""
    if not _LEAST_PROBABILITY <= failure_probability < 1:
        raise ValueError(f"failure_probability must be in [{_LEAST_PROBABILITY:g}, 1), got {failure_probability}")


def _rounding(n: int) -> float:
    """Relative rounding of sums of n doubles, with room."""
    return 8 * math.sqrt(n) * torch.finfo(torch.float64).eps
