"""The search for a Hessian eigenvalue below a threshold, by Lanczos steps until the verdict on the point is decided.

The threshold is -sqrt(rho epsilon), where epsilon is the threshold for the gradient norm and rho the Lipschitz constant
of the Hessian. If no epsilon is given, the threshold is 0.

A Rayleigh quotient below the threshold proves that an eigenvalue is below it. That no eigenvalue is below the threshold
follows from the lower bound of `lanczos`, which usually needs more steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor

from packsaddle.curvature.certificate import Verdict, judge, threshold_of
from packsaddle.curvature.hessian import Curvature
from packsaddle.curvature.lanczos import Lanczos, Ritz
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Products

_LONGEST_WALK = 12  # maximum number of distances at which the loss is evaluated along a direction


@dataclass(frozen=True)
class Bounds:
    """Bounds on the extreme eigenvalues of the Hessian after some steps of a search.

    The search passes them to the `progress` callback of `certify`.
    """

    products: int  # number of Hessian-vector products so far
    lambda_min: tuple[float, float]  # lower and upper bound on the smallest eigenvalue
    lambda_max: tuple[float, float]  # lower and upper bound on the largest eigenvalue
    threshold: float | None  # threshold for lambda_min, below which x is a saddle; None: no epsilon, or rho unknown

    def __str__(self) -> str:
        low, high = self.lambda_min
        asked = "" if self.threshold is None else f", threshold {self.threshold:.1e}"
        return f"lambda_min in [{low:.1e}, {high:.1e}]{asked}"


# (distance s, loss f(x + s v), largest f(x) - [f(x + s v) + f(x - s v)] / 2 over all distances)
Walk = tuple[float, float, float]


@dataclass
class CurvatureSearch:
    """A search for negative curvature of the Hessian, by the Lanczos method on the Hessian-vector products `products`.

    `run` does the search, and stores its results as attributes: rho, the bounds on the extreme eigenvalues (`lower`,
    `upper`, `lambda_max`), the direction `v` with its `residual`, and the verdict.
    """

    products: Products
    grad_norm: float
    epsilon: float | None  # threshold for the gradient norm; None: the verdict is only on the sign of lambda_min
    given_rho: float | None  # rho, the Lipschitz constant of the Hessian; None: measured along the direction found
    options: Search  # limits and tolerances of the search
    on_bounds: Callable[[Bounds], None]  # called with the current bounds after each step
    rho: float = field(init=False)
    lanczos: Lanczos = field(init=False)
    ritz: Ritz = field(init=False)
    lower: float = field(init=False)
    upper: float = field(init=False)
    lambda_max: tuple[float, float] = field(init=False)
    v: Tensor = field(init=False)
    residual: float = field(init=False)
    verdict: Verdict = field(init=False)

    @property
    def curvature(self) -> Curvature:
        return self.products.curvature

    def run(self) -> None:
        """Do Lanczos steps from a random start vector until the verdict is decided, and store the results.

        Let v be the Ritz vector of the smallest Ritz value. For a verdict that rests on negative curvature, the steps
        also continue until the residual of v is within `tolerance`. If no epsilon is given, they continue until v is
        nearly an eigenvector. They end in any case after `max_hvps` steps, or when the Krylov space is exhausted.
        """
        most, measured_at = self.options.max_hvps, 0
        gradient_decides = self.epsilon is not None and self.grad_norm > self.epsilon
        self.rho = self.given_rho or 0.0
        self.lanczos = lanczos = self._from_random_vector()
        for k in range(1, most + 1):
            self.ritz = ritz = lanczos.step()
            # Each step replaces the bounds. The new ones are never worse than the old ones, except by rounding.
            self._bound(ritz)
            is_known = measured_at or self.given_rho is not None
            threshold = threshold_of(self.epsilon, self.rho) if is_known else None
            low = self.lower, ritz.theta_min + ritz.rounding
            self.on_bounds(Bounds(k, low, self.lambda_max, threshold))
            last = k == most or lanczos.exhausted

            # If rho is not given, measure it as soon as the Ritz vector is nearly an eigenvector.
            if self.given_rho is None and not measured_at:
                if not (last or gradient_decides or ritz.is_settling):
                    continue
                self.rho, measured_at = self.products.rho(lanczos.ritz_vector()), k
            if not (last or self._settled(ritz)):
                continue
            if self.given_rho is None and measured_at < k:  # measure rho again, along the final direction v
                self.rho = max(self.rho, self.products.rho(lanczos.ritz_vector()))
                measured_at = k

            # Decide the verdict. It is certain if v^T H v is below the threshold, or if the lower bound on lambda_min
            # is not below it.
            if last or self._settled(ritz):
                self._measure_direction(ritz, lanczos.ritz_vector())
                if last or self.verdict is not Verdict.UNDECIDED or not ritz.orthogonal:
                    break

    @property
    def sharpest(self) -> Tensor | None:
        """The unit Ritz vector of the largest Ritz value, float64[d].

        It is None if only one product was computed, or if not all Lanczos vectors were stored.
        """
        if not self.ritz.orthogonal or self.ritz.steps == 1:
            return None
        return self.lanczos.ritz_vector(largest=True)

    def walk(self) -> Walk:
        """Evaluate the loss f at x + s v and x - s v for increasing distances s.

        Here x are the parameters, and v is the direction of negative curvature. The first s is max(1, ||x||) / 1000 or
        less, and each further s is four times the last one. The walk ends after 12 distances, or at the first s of at
        least max(1, ||x||) / 100 where neither loss is below that at the last s.

        Returns three numbers:

        - the distance s of the lowest loss found, negative if the loss was found at x - |s| v
        - the lowest loss found
        - the largest f(x) - [f(x + s v) + f(x - s v)] / 2 over all s, to which a slope of f contributes nothing

        Let lambda < 0 be the curvature along v, and rho the true Lipschitz constant of the Hessian. At any s from
        |lambda| / (2 rho) to four times that, the third number is at least |lambda|^3 / (10 rho^2).
        """
        curvature, losses = self.curvature, dict[float, tuple[float, float]]()
        reach, last = max(1.0, curvature.size_of_parameters()), (curvature.loss, curvature.loss)
        s = min(abs(self.upper) / (2 * self.rho), 1e-3 * reach)
        for _ in range(_LONGEST_WALK):
            losses[s] = ahead, behind = curvature.loss_at(self.v, s), curvature.loss_at(self.v, -s)
            # The walk does not stop at distances below max(1, ||x||) / 100, where the loss may rise by rounding alone.
            if s >= 1e-2 * reach and not (ahead < last[0] or behind < last[1]):
                break
            last, s = (ahead, behind), 4 * s
        sides = [(loss, s * sign) for s, pair in losses.items() for loss, sign in zip(pair, (1, -1), strict=True)]
        lowest, distance = min(sides, key=lambda side: side[0])
        return distance, lowest, max(curvature.loss - sum(pair) / 2 for pair in losses.values())

    def _from_random_vector(self) -> Lanczos:
        """Return a Lanczos process on the Hessian, from a random start vector; collective. It stores Lanczos vectors of
        up to `memory_limit` bytes in total, and at least two."""
        return Lanczos(
            self.products,
            self.curvature.random_vector(self.options.generator),
            max_vectors=max(2, self.options.memory_limit // (8 * self.curvature.d)),
            precision=self.products.precision,
            relative_error=lambda: self.products.relative_error,
            error=lambda: self.products.error,
        )

    def _bound(self, ritz: Ritz) -> None:
        probability = self.options.failure_probability
        self.lower = ritz.lower_bound(probability)
        self.lambda_max = ritz.theta_max - ritz.rounding, ritz.upper_bound(probability)

    def _settled(self, ritz: Ritz) -> bool:
        verdict = self._judged(ritz.theta_min + ritz.rounding)
        if verdict.rests_on_negative_curvature and ritz.residual > self.options.tolerance * abs(ritz.theta_min):
            return False
        return verdict is not Verdict.UNDECIDED and (self.epsilon is not None or ritz.is_settling)

    def _measure_direction(self, ritz: Ritz, v: Tensor) -> None:
        """Store the Ritz vector `v` as the direction, its residual, an upper bound on the smallest eigenvalue, and the
        verdict.

        The bound is the Rayleigh quotient of v plus its error. The quotient is the smallest Ritz value if the Lanczos
        vectors are orthonormal and the products are exact, and otherwise it is measured by one more product.
        """
        self.v, quotient, self.residual = v, ritz.theta_min, ritz.residual
        # The product of the first step was checked already.
        if not ritz.orthogonal or ((self.products.error or self.products.unproven) and ritz.steps > 1):
            quotient, error = self._measure_quotient()
            if error > ritz.rounding:
                self.ritz = ritz = replace(ritz, rounding=error)
                self._bound(ritz)
        self.upper = quotient + ritz.rounding
        self.verdict = self._judged(self.upper)

    def _measure_quotient(self) -> tuple[float, float]:
        """Compute the Rayleigh quotient of `self.v` by one Hessian-vector product, and store its residual in
        `self.residual`.

        Returns the quotient and the error of the product.
        """
        product, error = self.products.checked(self.v)
        quotient = float(self.v @ product)
        self.residual = float(product.sub_(self.v, alpha=quotient).norm())
        return quotient, error

    def _judged(self, upper: float) -> Verdict:
        return judge(self.grad_norm, self.epsilon, self.rho, self.lower, upper)
