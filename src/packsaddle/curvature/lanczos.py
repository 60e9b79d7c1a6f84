"""Two-sided bounds on the extreme eigenvalues of a symmetric matrix A, which is available only through products A v.

A Ritz value is always an upper bound on the smallest eigenvalue, lambda_min. For a fixed start vector there is no lower
bound. For a random start vector b, uniform on the unit sphere, there is one that fails with a given probability. Let
q_j = p_j(A) b be the Lanczos vectors, where the p_j are polynomials, and let v be a unit eigenvector of lambda_min.
Then <q_j, v> = p_j(lambda_min) <b, v>, and the q_j are orthonormal, so by Bessel's inequality

    <b, v>^2 sum_{j <= k} p_j(lambda_min)^2 <= 1,

The square <b, v>^2 has a Beta(1/2, (n - 1)/2) distribution, where n is the size of A. It is below the delta-quantile w
of this distribution with probability delta. Below the smallest Ritz value the sum over p_j(lambda)^2 grows as lambda
falls, so with probability 1 - delta

    lambda_min >= the lambda at which sum_{j <= k} p_j(lambda)^2 = 1 / w.

The Lanczos polynomials of -A with the same start vector b are the p_j reflected at 0, so the lower bound for -A gives
an upper bound on lambda_max. (van Dorsselaer, Hochstenbach and van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000, use
only the last polynomial p_k; the bound from the sum is never worse. Kuczynski and Wozniakowski's bound of 1992 assumes
the worst possible spectrum instead of the observed one, and is weaker.) The bound fails only if <b, v>^2 is below w,
which does not depend on the number of steps k. So to stop at the first k whose bound suffices does not increase the
failure probability.

In exact arithmetic the process ends with a beta of 0. If the products A q_k have rounding errors, as in float32, this
beta is at the level of the errors instead, and the next Lanczos vector consists of noise. So the bounds replace every
beta below `Ritz.rounding` with `Ritz.rounding`, which is measured. An exact product A q_k has the component 0 along
each of q_0 to q_{k-2}, and beta_k along q_{k-1}, so deviations from these components are errors of the products. These
deviations miss errors that are symmetric, like those of A itself, so `Ritz.rounding` is at least `relative_error` times
||A||, which the caller measures.

Products by differences of gradients have an error, whose norm tau is known. If they are linear, they are the products
of a matrix whose distance from A is at most tau, so its eigenvalues differ from those of A by at most tau (Weyl).
Therefore `Ritz.rounding` is at least tau, and both bounds are widened by `Ritz.rounding`. The lower bound also assumes
that the error is independent of <b, v>, as rounding and the third derivatives of a loss are. An error that depends on b
could hide v.

If not all Lanczos vectors are stored, rounding makes them lose their orthogonality. Each q_j still has norm 1, so
p_j(lambda_min)^2 <= 1 / w holds for each j separately. Beyond the memory limit the bound therefore uses the largest
term of the sum instead of the sum.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Maximum number of evaluations of the sum of p_j^2 in the computation of one bound; a dozen usually suffice.
_EVALUATIONS = 100
# Smallest rounding error of a product A v, in units of the last place of ||A||; typical for long sums
_ROUNDING = 16
# Below this square of a norm the squares of some coordinates may underflow, so the vector is multiplied by `_UP`.
_UNDERFLOW, _UP = 1e-280, 2.0**500
# Smallest valid failure probability: for smaller ones the quantile of the Beta distribution underflows.
_LEAST_PROBABILITY = 1e-100


@dataclass(frozen=True)
class Ritz:
    """The result of k Lanczos steps on a symmetric n x n matrix A. The eigenvalues of A are called lambda, and the Ritz
    values theta."""

    n: int  # n, the number of rows and of columns of A
    alphas: tuple[float, ...]  # k diagonal elements of the tridiagonal matrix of Lanczos
    betas: tuple[float, ...]  # off-diagonal elements of the tridiagonal matrix; the last: norm of the residual vector
    thetas: tuple[float, ...]  # k Ritz values, ascending
    shares: tuple[float, ...]  # one per Ritz value: squared component of the unit start vector b along its Ritz vector
    residual: float  # ||A v - theta_min v|| for the Ritz vector v of theta_min
    rounding: float  # estimated error of a product A v with a unit vector v, by which both bounds are widened
    exhausted: bool  # True if the Krylov space is invariant, so that Ritz values are eigenvalues up to rounding
    orthogonal: bool  # True if all Lanczos vectors were stored, and each new vector was orthogonalized against them

    @property
    def steps(self) -> int:
        """The number k of Lanczos steps, each of which computed one matrix-vector product."""
        return len(self.alphas)

    @property
    def theta_min(self) -> float:
        """The smallest Ritz value.

        If `orthogonal` is True, it is an upper bound on lambda_min, the smallest eigenvalue, up to rounding. Otherwise
        only the Rayleigh quotient of its Ritz vector is an upper bound.
        """
        return self.thetas[0]

    @property
    def theta_max(self) -> float:
        """The largest Ritz value.

        If `orthogonal` is True, it is a lower bound on lambda_max, the largest eigenvalue, up to rounding.
        """
        return self.thetas[-1]

    @property
    def is_settling(self) -> bool:
        """True if the Ritz vector of the smallest Ritz value, theta_min, is nearly an eigenvector, i.e. if its residual
        is at most |theta_min| / 10."""
        return self.residual <= 0.1 * abs(self.theta_min)

    def lower_bound(self, failure_probability: float) -> float:
        """Return a lower bound on lambda_min, the smallest eigenvalue.

        With probability 1 - `failure_probability` over the random start vector, the bounds after all numbers of Lanczos
        steps are valid simultaneously. `rounding`, the error of the products, is subtracted from the bound. Raises
        ValueError unless `failure_probability` is in [1e-100, 1).
        """
        check_probability(failure_probability)
        scale = max(abs(self.theta_min), abs(self.theta_max), self.betas[-1])
        if scale == 0.0 or self.n == 1:
            return self.theta_min - self.rounding
        from scipy.special import betaincinv  # imported here because it is slow to import

        limit = -math.log(float(betaincinv(0.5, (self.n - 1) / 2, failure_probability)))
        # Solve log(sum_j p_j(lambda)^2) = limit for s = log(theta_min - lambda) by the secant method. Each log p_j^2 is
        # a sum of log(e^s + distance to a root), so the left side is convex in s. Secants through points above the
        # limit therefore stay above it, up to rounding.
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
        """Return an upper bound on lambda_max, the largest eigenvalue of A.

        It is -1 times the lower bound on the smallest eigenvalue of -A. It fails with probability
        `failure_probability`, separately from `lower_bound`: the probability that one of the two fails is at most twice
        that.
        """
        turned = replace(
            self, alphas=tuple(-a for a in self.alphas), thetas=tuple(-theta for theta in reversed(self.thetas))
        )
        return -turned.lower_bound(failure_probability)

    def _log_growth(self, below: float, scale: float) -> float:
        """Return the log of sum_j p_j(`below`)^2 for the Lanczos polynomials p_j. If `orthogonal` is False, return the
        log of the largest term of this sum.

        `below` is less than theta_min, and `scale` is about the norm of A. The ratio of two consecutive polynomials is
        -p_{j+1} / p_j = d_j / beta_{j+1}. Here the d_j are the pivots of the tridiagonal matrix minus `below` times the
        identity, which are all positive.
        """
        floor, least = max(self.rounding, _rounding(self.n) * scale), math.ulp(scale)
        pivot, term, total, before = 0.0, 0.0, 0.0, 0.0  # `term` is log p_j^2, `total` the log of their sum
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            pivot = alpha - below - (before * (before / pivot) if before else 0.0)
            pivot = pivot if pivot > least else least
            before = beta
            term += 2 * math.log(pivot / (beta if beta > floor else floor))
            low, high = (total, term) if total < term else (term, total)
            total = high + math.log1p(math.exp(low - high)) if self.orthogonal else high
        return total


class Lanczos:
    """The Lanczos process on a symmetric matrix A, with one product A v in each `step`.

    Args:
        matvec: a function that maps v, float64[n], to A v, float64[n].
        start: a Gaussian vector, float64[n], drawn anew for every certificate and identical on all workers.
        n: the size of A, if each worker has only a part of every vector; by default the length of `start`.
        dot: the inner product of two vectors, float64[]; collective if each worker has only a part of them.
        max_vectors: maximum number of Lanczos vectors to store, at least 2; None: all. While all are stored, each new
            vector is orthogonalized against them twice. The computation of a Ritz vector needs one more product for
            each vector that was not stored.
        precision: unit roundoff of the products.
        relative_error: returns the current estimate of the rounding error of a product, relative to ||A||. The error
            assumed is at least 16 times `precision`.
        error: returns the current estimate of the error of a product with a unit vector.

    Recurrences are computed in float64. Raises ValueError for `max_vectors` below 2.
    """

    def __init__(
        self,
        matvec: Callable[[Tensor], Tensor],
        start: Tensor,
        *,
        n: int | None = None,
        dot: Callable[[Tensor, Tensor], Tensor] = torch.dot,
        max_vectors: int | None = None,
        precision: float = torch.finfo(torch.float64).eps,
        relative_error: Callable[[], float] = lambda: 0.0,
        error: Callable[[], float] = lambda: 0.0,
    ) -> None:
        if max_vectors is not None and max_vectors < 2:
            raise ValueError(f"max_vectors must be at least 2, got {max_vectors}")
        self._matvec, self._n, self._precision = matvec, len(start) if n is None else n, precision
        self._dot, self._limit = dot, max_vectors or self._n
        self._relative_error, self._known_error = relative_error, error
        # Largest magnitude, over all products so far, of a component of A q_k that would be 0 in exact arithmetic.
        self._error = 0.0
        self._basis = [start / self._norm(start)]
        # The last two Lanczos vectors, q_{k-1} and q_k; before the first step q_{k-1} is empty.
        self._pair = (torch.zeros(0), self._basis[0])
        self._alphas: list[float] = []
        self._betas: list[float] = []
        # float64[k, 2]: coefficients, in the basis, of the Ritz vectors of the smallest and the largest Ritz value
        self._ends = torch.ones(1, 2, dtype=torch.float64)

    @property
    def exhausted(self) -> bool:
        """True if the Krylov space of the start vector is invariant under A, so that no further step is possible."""
        return bool(self._betas) and self._betas[-1] == 0.0

    def step(self) -> Ritz:
        """Do one Lanczos step, with one product A v, and return the result of all steps so far. Raises RuntimeError if
        `exhausted`."""
        if self.exhausted:
            raise RuntimeError("the Krylov space is exhausted; there is no further step")

        # Compute beta_{k+1} q_{k+1} = A q_k - alpha_k q_k - beta_k q_{k-1}, orthogonalized against all stored q_j.
        before, q = self._pair
        product = self._matvec(q)
        along_q = self._dot(product, q)
        w = self._recur(product, along_q, q, before, len(self._alphas))
        orthogonal, components = len(self._alphas) < self._limit, list[Tensor]()
        if orthogonal:
            for sweep in range(2):
                for p in self._basis:
                    component = self._dot(w, p)
                    w.addcmul_(p, component, value=-1.0)
                    # For p = q the component is only the rounding error of alpha, and not an error of the product.
                    if sweep == 0 and p is not q:
                        components.append(component)
        # Read all numbers together, so that the host waits for a GPU only once.
        alpha, square, *found = torch.stack([along_q, self._dot(w, w), *components]).tolist()
        self._error = max([self._error, *map(abs, found)])
        self._alphas.append(alpha)
        beta = math.sqrt(square) if square > _UNDERFLOW else self._norm(w.mul(_UP)) / _UP

        # The Ritz values are the eigenvalues of the tridiagonal matrix. The process ends if beta is at rounding level.
        off = torch.diag(torch.tensor(self._betas, dtype=torch.float64), 1)
        thetas, vectors = torch.linalg.eigh(torch.diag(torch.tensor(self._alphas, dtype=torch.float64)) + (off + off.T))
        self._ends = vectors[:, [0, -1]]
        scale = max(abs(float(thetas[0])), abs(float(thetas[-1])), beta)
        exhausted = len(self._alphas) == self._n or beta <= _rounding(self._n) * scale
        self._betas.append(0.0 if exhausted else beta)
        if not exhausted:
            self._pair = (q, w.div_(beta))
            if len(self._basis) < self._limit:
                self._basis.append(self._pair[1])

        # The errors of the k products so far form an n x k matrix. Its columns are assumed independent, each with the
        # norm that `_known_error` returns. By Marchenko and Pastur the norm of such a matrix is about 1 + sqrt(k / n)
        # times the norm of a column.
        known = self._known_error() * (1 + math.sqrt(len(self._alphas) / self._n))
        relative = max(_ROUNDING * self._precision, self._relative_error())
        # The residual ||A v - theta_min v|| is beta |y_k|, where y_k is the last component of theta_min's eigenvector y
        # of the tridiagonal matrix.
        return Ritz(
            self._n,
            tuple(self._alphas),
            tuple(self._betas),
            tuple(thetas.tolist()),
            tuple(vectors[0].square().tolist()),
            beta * abs(float(vectors[-1, 0])),
            max(relative * scale, 2 * self._error, known),
            exhausted,
            orthogonal,
        )

    def ritz_vector(self, *, largest: bool = False) -> Tensor:
        """Return the unit Ritz vector of the smallest Ritz value, float64[n]. If `largest` is True, return that of the
        largest Ritz value instead."""
        v = torch.zeros_like(self._basis[0])
        weights = self._ends[:, int(largest)].tolist()
        for weight, q in zip(weights, self._basis, strict=False):
            v.add_(q, alpha=weight)
        if len(weights) > len(self._basis):
            before, q = self._basis[-2:]
            for j in range(len(self._basis) - 1, len(weights) - 1):
                w = self._recur(self._matvec(q), q.new_tensor(self._alphas[j]), q, before, j)
                before, q = q, w.div_(self._betas[j])
                v.add_(q, alpha=weights[j + 1])
        return v.div_(self._norm(v))

    def _norm(self, v: Tensor) -> float:
        return math.sqrt(float(self._dot(v, v)))

    def _recur(self, product: Tensor, alpha: Tensor, q: Tensor, before: Tensor, j: int) -> Tensor:
        """Return A q_j - alpha_j q_j - beta_j q_{j-1}, float64[n], the next Lanczos vector before its normalization.

        Args:
            product: A q_j, which is not modified.
            alpha: alpha_j, float64[].
            q: q_j.
            before: q_{j-1}, which is ignored if j is 0.
            j: the index of q.
        """
        w = product.addcmul(q, alpha, value=-1.0)
        return w.sub_(before, alpha=self._betas[j - 1]) if j else w


def check_probability(failure_probability: float) -> None:
    if not _LEAST_PROBABILITY <= failure_probability < 1:
        raise ValueError(f"failure_probability must be in [{_LEAST_PROBABILITY:g}, 1), got {failure_probability}")


def _rounding(n: int) -> float:
    """Return an estimate, on the high side, of the relative rounding error of a sum of n float64 numbers."""
    return 8 * math.sqrt(n) * torch.finfo(torch.float64).eps
