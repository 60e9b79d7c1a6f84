"""The search for curvature below the threshold: Lanczos steps until the verdict is decided.

One Rayleigh quotient over all examples proves a saddle, for a direction from any source. So `pilot` first searches for
a direction on a part of the examples, where products are cheaper, and `CurvatureSearch.proves` computes one product
over all. Only the absence of negative curvature needs the whole process over all examples.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from packsaddle.curvature.certificate import Verdict, judge
from packsaddle.curvature.hessian import Curvature, every_nth
from packsaddle.curvature.lanczos import Lanczos, Ritz
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Products, lanczos_over

_LONGEST_WALK = 12
_PILOT_SHARE = 8  # all examples are at least this multiple of a pilot's
_PILOT_COST = 2  # products over all examples that a pilot may cost


@dataclass(frozen=True)
class Bounds:
    """The bounds of a search after some products, as passed to its progress callback."""

    products: int  # so far
    most: int  # limit of the products
    examples: int  # number of examples in a product
    lambda_min: tuple[float, float]  # lower and upper bound
    lambda_max: tuple[float, float]  # the same
    threshold: float | None  # of lambda_min for a saddle; None: rho is not measured yet

    def __str__(self) -> str:
        low, high = self.lambda_min
        asked = "" if self.threshold is None else f", threshold {self.threshold:.1e}"
        return f"lambda_min in [{low:.1e}, {high:.1e}] of {self.examples:,} examples{asked}"


OnBounds = Callable[[Bounds], None]
Walk = tuple[float, float, float]  # s, f(x + s v), and the largest f(x) - [f(x + s v) + f(x - s v)] / 2


@dataclass(frozen=True)
class Goal:
    """The gradient norm and thresholds that a verdict depends on, and the limits of a search."""

    grad_norm: float
    epsilon: float
    rho: float | None  # None: measured along the direction found
    options: Search


@dataclass
class CurvatureSearch:
    """Lanczos steps until the goal is reached, and their results after `run` or `proves`."""

    products: Products
    goal: Goal
    on_bounds: OnBounds
    rho: float = field(init=False)
    lower: float = -math.inf
    lambda_max: tuple[float, float] = (-math.inf, math.inf)
    lanczos: Lanczos | None = None
    ritz: Ritz | None = None
    v: Tensor = field(init=False)
    error: float = 0.0  # error of a product, included in the bounds
    upper: float = math.inf
    residual: float = math.inf
    verdict: Verdict = Verdict.UNDECIDED

    def __post_init__(self) -> None:
        self.rho = self.goal.rho or 0.0

    @property
    def curvature(self) -> Curvature:
        """The derivatives that the products use."""
        return self.products.curvature

    def run(self) -> None:
        """Do Lanczos steps from a random start until the verdict is decided and v and lambda_max meet their tolerances,
        or until `max_hvps` products or exhaustion."""
        goal, measured_at = self.goal, 0
        self.rho = goal.rho or 0.0
        self.lanczos = lanczos = lanczos_over(self.products, goal.options)
        for k in range(1, goal.options.max_hvps + 1):
            self.ritz = ritz = lanczos.step()
            self._bound(ritz)  # never worse than an earlier bound, up to rounding
            self._report(ritz, k, measured_at > 0 or goal.rho is not None)
            last = k == goal.options.max_hvps or lanczos.exhausted

            # Measure rho, if not given, once v is good enough: ||H(x + h v) v - H(x - h v) v|| / (2 h).
            if goal.rho is None and not measured_at:
                if not (last or goal.grad_norm > goal.epsilon or ritz.is_settling):
                    continue
                self.rho, measured_at = self.products.rho(lanczos.ritz_vector()), k
            if not (last or self._settled(ritz)):
                continue
            if goal.rho is None and measured_at < k:  # rho is at least that along the final v
                self.rho = max(self.rho, self.products.rho(lanczos.ritz_vector()))
                measured_at = k

            # The verdict: v^T H v <= -sqrt(rho epsilon), or the lower bound on lambda_min above it.
            if last or self._settled(ritz):
                self._measure_direction(ritz, lanczos.ritz_vector())
                if last or self.verdict is not Verdict.UNDECIDED or not ritz.orthogonal:
                    break

    def proves(self, v: Tensor, rounding: float) -> bool:
        """Measure v's Rayleigh quotient, and rho along v if not given; return True if they prove a saddle.

        `rounding` is the error of products over other examples; the error assumed here is at least that.
        """
        self.v = v
        quotient, error = self._measure_quotient()
        self.error = max(error, rounding)
        self.upper = quotient + self.error
        if self.goal.rho is None:
            self.rho = self.products.rho(v)
        self.verdict = self._judged(self.upper)
        return self.verdict is Verdict.SADDLE

    @property
    def sharpest(self) -> Tensor | None:
        """The unit Ritz vector of lambda_max, float64[d]; None after one product, or if vectors were not stored."""
        if self.lanczos is None or self.ritz is None or not self.ritz.orthogonal or self.ritz.steps == 1:
            return None
        return self.lanczos.ritz_vector(largest=True)

    def walk(self, pilot_search: "CurvatureSearch | None") -> Walk:
        """Evaluate f(x + s v) and f(x - s v), from s = ||x|| / 1000 or less in factors of 4, while one of them falls.

        With a scout, the losses of its examples select two s, at which f is then evaluated on all examples. Returns s
        and f(x + s v) of the lowest loss, and the largest decrease of the mean of both sides, which a slope cannot
        cause: |lambda|^3 / (10 rho^2) or more for the true rho, at any s from |lambda| / (2 rho) to four times that.
        """
        losses = (pilot_search or self)._follow(self.v, self.upper, self.rho)
        if pilot_search is not None:
            chosen = {min(losses, key=lambda s: min(losses[s])), min(losses, key=lambda s: sum(losses[s]))}
            losses = {s: self._on_both_sides(self.v, s) for s in sorted(chosen)}
        sides = [(loss, s * sign) for s, pair in losses.items() for loss, sign in zip(pair, (1, -1), strict=True)]
        lowest, distance = min(sides, key=lambda side: side[0])
        return distance, lowest, max(self.curvature.loss - sum(pair) / 2 for pair in losses.values())

    def _follow(self, v: Tensor, upper: float, rho: float) -> dict[float, tuple[float, float]]:
        """Return f(x + s v) and f(x - s v) for every distance s evaluated."""
        reach = max(1.0, self.curvature.size_of_parameters())
        s = min(abs(upper) / (2 * rho), 1e-3 * reach)
        losses: dict[float, tuple[float, float]] = {}
        last = (self.curvature.loss, self.curvature.loss)
        for _ in range(_LONGEST_WALK):
            losses[s] = ahead, behind = self._on_both_sides(v, s)
            # At shorter distances the loss may rise by rounding alone.
            if s >= 1e-2 * reach and not (ahead < last[0] or behind < last[1]):
                break
            last, s = (ahead, behind), 4 * s
        return losses

    def _on_both_sides(self, v: Tensor, s: float) -> tuple[float, float]:
        return self.curvature.loss_at(v, s), self.curvature.loss_at(v, -s)

    def _bound(self, ritz: Ritz) -> None:
        probability = self.goal.options.failure_probability
        self.lower = ritz.lower_bound(probability)
        self.lambda_max = ritz.theta_max - ritz.rounding, ritz.upper_bound(probability)

    def _report(self, ritz: Ritz, k: int, rho_is_known: bool) -> None:
        threshold = -math.sqrt(self.rho * self.goal.epsilon) if rho_is_known else None
        bounds = self.lower, ritz.theta_min + ritz.rounding
        self.on_bounds(
            Bounds(k, self.goal.options.max_hvps, self.curvature.examples, bounds, self.lambda_max, threshold)
        )

    def _settled(self, ritz: Ritz) -> bool:
        low, high = self.lambda_max
        if high - low > self.goal.options.sharpness * max(abs(low), abs(high)):
            return False
        verdict = self._judged(ritz.theta_min + ritz.rounding)
        if verdict is Verdict.SADDLE and ritz.residual > self.goal.options.tolerance * abs(ritz.theta_min):
            return False
        return verdict is not Verdict.UNDECIDED

    def _measure_direction(self, ritz: Ritz, v: Tensor) -> None:
        """Set v, its residual, the bound by its Rayleigh quotient and the verdict: from the recurrence if the basis is
        orthonormal and products are exact, else from a measurement."""
        self.v, quotient, self.residual = v, ritz.theta_min, ritz.residual
        if not ritz.orthogonal or self.products.error or (self.products.unproven and ritz.steps > 1):
            quotient, error = self._measure_quotient()
            if error > ritz.rounding:
                self.ritz = ritz = replace(ritz, rounding=error)
                self._bound(ritz)
        self.error = ritz.rounding
        self.upper = quotient + self.error
        self.verdict = self._judged(self.upper)

    def _measure_quotient(self) -> tuple[float, float]:
        """Measure v's residual; return its Rayleigh quotient and the error of the product."""
        product, error = self.products.checked(self.v)
        quotient = self.curvature.dot(self.v, product)
        self.residual = self.curvature.norm(product.sub_(self.v, alpha=quotient))
        return quotient, error

    def _judged(self, upper: float) -> Verdict:
        norm, epsilon = self.goal.grad_norm, self.goal.epsilon
        return judge(norm, norm, epsilon, -math.sqrt(self.rho * epsilon), upper, self.lower)


def pilot(
    full: Products,
    goal: Goal,
    batches: Iterable[Any],
    derivatives: Callable[[Iterable[Any]], Curvature],
    on_bounds: OnBounds,
) -> CurvatureSearch | None:
    """Search on about `pilot_examples` examples, in evenly spaced batches; collective.

    Returns the search if it found a saddle of these examples, else None; None also if there are fewer than eight times
    as many examples, or batches are too large to skip seven of eight. The method of products is that of `full`; their
    total cost is at most about two products over all examples.
    """
    curvature, search = full.curvature, goal.options
    examples = search.pilot_examples
    stride = curvature.examples // examples if examples else 0
    if stride < _PILOT_SHARE or _PILOT_SHARE * curvature.examples_of_every(stride) > curvature.examples:
        return None
    part = derivatives(every_nth(batches, stride))
    most = max(1, _PILOT_COST * curvature.examples // part.examples)
    goal = replace(goal, options=replace(search, max_hvps=min(search.max_hvps, most)))
    pilot_search = CurvatureSearch(full.of(part), goal, on_bounds)
    try:
        pilot_search.run()
    finally:
        curvature.passes += part.passes * part.examples / curvature.examples
    full.copy_estimates(pilot_search.products)
    return pilot_search if pilot_search.verdict is Verdict.SADDLE else None
