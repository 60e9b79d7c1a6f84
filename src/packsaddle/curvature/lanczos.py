"""Two-sided bounds on extreme eigenvalues of a symmetric matrix A given by products, with a failure probability.

A Ritz value is always an upper bound on the smallest eigenvalue, lambda_min. For a fixed start vector there is no lower
bound. For a start b uniform on the sphere, let q_j = p_j(A) b be the Lanczos vectors, with polynomials p_j. If v is a
unit eigenvector of lambda_min, then <q_j, v> = p_j(lambda_min) <b, v>, and the q_j are orthonormal, so by Bessel's
inequality

    <b, v>^2 sum_{j <= k} p_j(lambda_min)^2 <= 1,

while <b, v>^2 has a Beta(1/2, (n - 1)/2) distribution: it is below its delta-quantile w with probability delta. Below
the smallest Ritz value the sum grows as lambda falls, so with probability 1 - delta

    lambda_min >= the lambda at which sum_{j <= k} p_j(lambda)^2 = 1 / w.

The Lanczos polynomials of -A from b are p_j reflected at 0, so the lower bound for -A gives an upper bound on
lambda_max. (van Dorsselaer, Hochstenbach and van der Vorst, SIAM J. Matrix Anal. Appl. 22, 2000, use the last
polynomial alone; the sum is never worse. Kuczynski and Wozniakowski's bound of 1992 assumes the worst spectrum instead
of the observed one, and is weaker.) The event that the bound fails is the same for every k, so stopping once the bound
suffices adds no failure probability.

Rounding of the products, as in float32, leaves noise where the process would end. Once a beta is at that level, the
next vector is noise too, so betas are clamped to at least `Ritz.rounding`. It is measured: exact A q_k has component 0
along q_0 ... q_{k-2} and beta_k along q_{k-1}, so deviations from these are errors of the products.

Linear products with a known error tau, as differences of gradients have, are those of a matrix within tau of A, whose
eigenvalues are within tau of A's (Weyl). So `Ritz.rounding` is at least tau, and both bounds are widened by it. The
lower bound also assumes that the error is independent of <b, v>, as rounding and the third derivatives of a loss are:
an error that depends on the start could hide v.

Without stored vectors orthogonality is lost to rounding, but each q_j still has norm 1, so p_j(lambda_min)^2 <= 1 / w
for each j separately: beyond the memory limit the bound uses the largest term instead of the sum.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Number = Tensor | float
_EVALUATIONS = 100  # maximum number of evaluations of the sum of p_j^2 for one bound; usually a dozen suffice
_ROUNDING = 16  # rounding error of a product, in units of the last place of ||A||, typical of long sums
# Smallest valid failure probability; the quantile of the Beta distribution underflows below it
_LEAST_PROBABILITY = 1e-100


@dataclass(frozen=True)
class Ritz:
    """The result of k Lanczos steps on a symmetric n x n matrix A. The eigenvalues of A are called lambda, and the Ritz
    values theta."""

    n: int  # size of A
    alphas: tuple[float, ...]  # k diagonal entries of the tridiagonal matrix
    betas: tuple[float, ...]  # k off-diagonal entries of the tridiagonal; the last is the residual's norm after step k
    thetas: tuple[float, ...]  # k Ritz values, ascending
    shares: tuple[float, ...]  # k squared components of the unit start vector b, one along each Ritz vector
    residual: float  # ||A v - theta_min v|| for the Ritz vector v of theta_min
    rounding: float  # approximate rounding error of a product A v along one direction
    exhausted: bool  # True if the Krylov space is invariant, so that Ritz values are eigenvalues up to rounding
    orthogonal: bool  # True if all vectors were stored and used for reorthogonalization

    @property
    def steps(self) -> int:
        """The number k of Lanczos steps, each of which computed one matrix-vector product."""
        return len(self.alphas)

    @property
    def theta_min(self) -> float:
        """The smallest Ritz value. It is an upper bound on lambda_min, the smallest eigenvalue, if `orthogonal`. If
        not, only the Rayleigh quotient of its Ritz vector is an upper bound."""
        return self.thetas[0]

    @property
    def theta_max(self) -> float:
        """The largest Ritz value. It is a lower bound on lambda_max, the largest eigenvalue, if `orthogonal`."""
        return self.thetas[-1]

    @property
    def is_settling(self) -> bool:
        """True if the Ritz vector of the smallest Ritz value, theta_min, is nearly an eigenvector, i.e. if its residual
        is at most |theta_min| / 10."""
        return self.residual <= 0.1 * abs(self.theta_min)

    def lower_bound(self, failure_probability: float) -> float:
        """Return a lower bound on the smallest eigenvalue, lambda_min, with `rounding` subtracted.

        With probability 1 - `failure_probability` over the random start vector, the bounds after every number of
        Lanczos steps hold simultaneously. Raises ValueError unless the probability is in [1e-100, 1).
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
        """Return an upper bound on the largest eigenvalue of A, which is -1 times the lower bound on the smallest
        eigenvalue of -A. It fails with probability `failure_probability`, in addition to that of `lower_bound`."""
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
            pivot = alpha - below - (before * before / pivot if before else 0.0)
            pivot = pivot if pivot > least else least
            before = beta
            term += 2 * math.log(pivot / (beta if beta > floor else floor))
            low, high = (total, term) if total < term else (term, total)
            total = high + math.log1p(math.exp(low - high)) if self.orthogonal else high
        return total


class Lanczos:
    """The Lanczos process on a symmetric matrix A, with one product in each `step`.

    `matvec` maps v, float64[n], to A v, float64[n]. `start`, float64[n], is Gaussian, new for every certificate and
    identical on all workers. `precision` is the unit roundoff of the products. `error()` returns the current estimate
    of the error of a product with a unit vector, without this rounding. Vectors may be sharded: then `n` is their whole
    length, and `dot` is collective. `dot` returns a number, or a float64[], for which the host waits once per step.

    The first `max_vectors` vectors are stored, by default all. While all are stored, each new vector is orthogonalized
    against them twice. A Ritz vector needs one product for each vector that is not stored. Recurrences are in float64.
    Raises ValueError for `max_vectors` below 2.
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
        dot: Callable[[Tensor, Tensor], Number] = torch.dot,
    ) -> None:
        if max_vectors is not None and max_vectors < 2:
            raise ValueError(f"max_vectors must be at least 2, got {max_vectors}")
        n = len(start) if n is None else n
        self._matvec, self._n, self._limit, self._precision = matvec, n, max_vectors or n, precision
        self._known_error, self._dot = error, dot
        # The largest magnitude of a product's component that would be 0 in exact arithmetic, over all products so far.
        self._error = 0.0
        self.products = 0  # number of products so far, including those for Ritz vectors
        self._basis = [start / self._norm(start)]
        self._pair = (torch.zeros(0), self._basis[0])  # the last two Lanczos vectors
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._ends = torch.ones(1, 2, dtype=torch.float64)  # coefficients of the extreme Ritz vectors in the basis

    @property
    def exhausted(self) -> bool:
        """True if the Krylov space is invariant, so that no further step is possible."""
        return bool(self._betas) and self._betas[-1] == 0.0

    def step(self) -> Ritz:
        """Do one Lanczos step, with one product, and return the result so far. Raises RuntimeError if `exhausted`."""
        if self.exhausted:
            raise RuntimeError("the Krylov space is exhausted; there is no further step")

        # Compute beta_{k+1} q_{k+1} = A q_k - alpha_k q_k - beta_k q_{k-1}, orthogonalized against all stored q_j.
        before, q = self._pair
        w = self._product(q)
        alpha = self._dot(w, q)
        w = self._recur(w, alpha, q, before)
        orthogonal, components = len(self._alphas) < self._limit, list[Number]()
        if orthogonal:
            for sweep in range(2):
                for p in self._basis:
                    component = self._dot(w, p)
                    _minus(w, p, component, in_place=True)
                    if sweep == 0 and p is not q:  # for p = q the component is only the rounding error of alpha
                        components.append(component)
        alpha, square, *found = _read([alpha, self._dot(w, w), *components])
        self._error = max([self._error, *map(abs, found)])
        self._alphas.append(alpha)
        beta = math.sqrt(square)

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

        # The errors of the k products form an n x k matrix, whose columns are independent and have the known norm. By
        # Marchenko and Pastur the norm of this matrix is about 1 + sqrt(k / n) times the known norm.
        known = self._known_error() * (1 + math.sqrt(len(self._alphas) / self._n))
        # The residual ||A v - theta_min v|| is beta |y_k|, where y_k is the last component of theta_min's eigenvector y
        # of the tridiagonal matrix.
        return Ritz(
            self._n,
            tuple(self._alphas),
            tuple(self._betas),
            tuple(thetas.tolist()),
            tuple(vectors[0].square().tolist()),
            beta * abs(float(vectors[-1, 0])),
            max(_ROUNDING * self._precision * scale, 2 * self._error, known),
            exhausted,
            orthogonal,
        )

    def run(
        self, most: int, is_enough: Callable[[Ritz], bool], progress: Callable[[int], None] = lambda steps: None
    ) -> Ritz:
        """Do at most `most` steps, until `is_enough` returns True for the result so far, or no further step is
        possible. Calls `progress` after each step, and returns the last result."""
        for k in range(1, most + 1):
            ritz = self.step()
            progress(k)
            if self.exhausted or is_enough(ritz):
                break
        return ritz

    def ritz_vector(self, *, largest: bool = False) -> Tensor:
        """Return the unit Ritz vector of the smallest Ritz value, or with `largest` of the largest one, float64[n]."""
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

    def _norm(self, v: Tensor) -> float:
        return math.sqrt(float(self._dot(v, v)))

    def _product(self, q: Tensor) -> Tensor:
        self.products += 1
        return self._matvec(q)

    def _recur(self, product: Tensor, alpha: Number, q: Tensor, before: Tensor, j: int | None = None) -> Tensor:
        """Return A q_j - alpha_j q_j - beta_j q_{j-1}, the next Lanczos vector before its normalization. `product` is A
        q_j, and is not modified."""
        j = len(self._alphas) if j is None else j
        w = _minus(product, q, alpha)
        return w.sub_(before, alpha=self._betas[j - 1]) if j else w


def _minus(w: Tensor, p: Tensor, by: Number, *, in_place: bool = False) -> Tensor:
    """Return w - by * p. If `by` is a tensor on a GPU, the host does not wait for its value."""
    if isinstance(by, Tensor) and by.device.type != "cpu":
        return (w.addcmul_ if in_place else w.addcmul)(p, by, value=-1.0)
    return (w.sub_ if in_place else w.sub)(p, alpha=float(by))


def _read(numbers: Sequence[Number]) -> list[float]:
    """Convert numbers to floats. They are either all floats or all tensors. For tensors the host waits only once."""
    tensors = [number for number in numbers if isinstance(number, Tensor)]
    return torch.stack(tensors).tolist() if tensors else list(map(float, numbers))


def check_probability(failure_probability: float) -> None:
    if not _LEAST_PROBABILITY <= failure_probability < 1:
        raise ValueError(f"failure_probability must be in [{_LEAST_PROBABILITY:g}, 1), got {failure_probability}")


def _rounding(n: int) -> float:
    """Return a generous estimate of the relative rounding error of a sum of n float64 numbers."""
    return 8 * math.sqrt(n) * torch.finfo(torch.float64).eps
