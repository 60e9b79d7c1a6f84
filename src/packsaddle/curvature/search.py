"""The search for curvature below the threshold: Lanczos steps until the verdict is settled.

A saddle is proved by one Rayleigh quotient over all examples, whatever its direction came from. So `pilot` looks for a
direction on a part of the examples first, where a product costs a fraction, and `CurvatureSearch.proves` takes one
product over all of them. Only the absence of negative curvature needs the whole process over all examples.
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
    """The knowledge of a search after `products`, as its progress is told."""

    products: int
    most: int  # products at most
    examples: int  # over which they are
    lambda_min: tuple[float, float]  # lower and upper bound
    lambda_max: tuple[float, float]  # the same
    threshold: float | None  # of lambda_min for a saddle; None: rho is not measured yet

    def __str__(self) -> str:
        low, high = self.lambda_min
        asked = "" if self.threshold is None else f", threshold {self.threshold:.1e}"
        return f"lambda_min in [{low:.1e}, {high:.1e}] of {self.examples:,} examples{asked}"


Told = Callable[[Bounds], None]
Walk = tuple[float, float, float]  # s, f(x + s v), and the most that [f(x + s v) + f(x - s v)] / 2 is below f(x)


@dataclass(frozen=True)
class Goal:
    """The question of a search, and its limits."""

    grad_norm: float
    epsilon: float
    rho: float | None  # None: measured along the direction found
    options: Search


@dataclass
class CurvatureSearch:
    """Steps of the Lanczos process until the goal is reached; after `run` or `proves`, the knowledge then."""

    products: Products
    goal: Goal
    told: Told
    rho: float = field(init=False)
    lower: float = -math.inf
    lambda_max: tuple[float, float] = (-math.inf, math.inf)
    lanczos: Lanczos | None = None
    ritz: Ritz | None = None
    v: Tensor = field(init=False)
    error: float = 0.0  # what a product may be wrong by, taken off the bounds
    upper: float = math.inf
    residual: float = math.inf
    verdict: Verdict = Verdict.UNDECIDED

    def __post_init__(self) -> None:
        self.rho = self.goal.rho or 0.0

    @property
    def curvature(self) -> Curvature:
        """The derivatives that products come from."""
        return self.products.curvature

    def run(self) -> None:
        """Do steps from a random start until the verdict is settled, v and lambda_max good enough, `max_hvps` are done,
        or there are no more."""
        goal, measured_at = self.goal, 0
        self.rho = goal.rho or 0.0
        self.lanczos = lanczos = lanczos_over(self.products, goal.options)
        for k in range(1, goal.options.max_hvps + 1):
            self.ritz = ritz = lanczos.step()
            self._bound(ritz)  # never worse than an earlier bound but by its error
            self._tell(ritz, k, measured_at > 0 or goal.rho is not None)
            last = k == goal.options.max_hvps or lanczos.exhausted

            # rho where it is not given: ||H(x + h v) v - H(x - h v) v|| / (2 h), as soon as v is good enough.
            if goal.rho is None and not measured_at:
                if not (last or goal.grad_norm > goal.epsilon or ritz.is_settling):
                    continue
                self.rho, measured_at = self.products.rho(lanczos.ritz_vector()), k
            if not (last or self._settled(ritz)):
                continue
            if goal.rho is None and measured_at < k:  # rho is that of the final v at least
                self.rho = max(self.rho, self.products.rho(lanczos.ritz_vector()))
                measured_at = k

            # The verdict: v^T H v <= -sqrt(rho epsilon), or the lower bound on lambda_min above it.
            if last or self._settled(ritz):
                self._measure_direction(ritz, lanczos.ritz_vector())
                if last or self.verdict is not Verdict.UNDECIDED or not ritz.orthogonal:
                    break

    def proves(self, v: Tensor, rounding: float) -> bool:
        """Measure v's Rayleigh quotient, and rho along it where it is not given; tell if they prove a saddle.

        `rounding` is what products of other examples were found to be wrong by, and no less is allowed for here.
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
        """The unit Ritz vector of lambda_max, float64[d]; None after one product, and where vectors were not kept."""
        if self.lanczos is None or self.ritz is None or not self.ritz.orthogonal or self.ritz.steps == 1:
            return None
        return self.lanczos.ritz_vector(largest=True)

    def walk(self, scout: "CurvatureSearch | None") -> Walk:
        """Follow v both ways, from ||x|| / 1000 or less, each step four times the last, while the loss falls on a side.

        A scout follows it on its own examples, and the two steps that its losses choose are measured on all. Returns s
        and f(x + s v) with the lowest loss found, and the most that the mean of both sides fell, which a slope cannot
        do: with rho true, |lambda|^3 / (10 rho^2) at least, at any s from |lambda| / (2 rho) to four times that.
        """
        losses = (scout or self)._follow(self.v, self.upper, self.rho)
        if scout is not None:
            chosen = {min(losses, key=lambda s: min(losses[s])), min(losses, key=lambda s: sum(losses[s]))}
            losses = {s: self._on_both_sides(self.v, s) for s in sorted(chosen)}
        sides = [(loss, s * sign) for s, pair in losses.items() for loss, sign in zip(pair, (1, -1), strict=True)]
        lowest, distance = min(sides, key=lambda side: side[0])
        return distance, lowest, max(self.curvature.loss - sum(pair) / 2 for pair in losses.values())

    def _follow(self, v: Tensor, upper: float, rho: float) -> dict[float, tuple[float, float]]:
        """The losses ahead and behind at every distance looked at."""
        reach = max(1.0, self.curvature.size_of_parameters())
        s = min(abs(upper) / (2 * rho), 1e-3 * reach)
        losses: dict[float, tuple[float, float]] = {}
        last = (self.curvature.loss, self.curvature.loss)
        for _ in range(_LONGEST_WALK):
            losses[s] = ahead, behind = self._on_both_sides(v, s)
            # Shorter steps may rise by rounding alone.
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

    def _tell(self, ritz: Ritz, k: int, known: bool) -> None:
        threshold = -math.sqrt(self.rho * self.goal.epsilon) if known else None
        bounds = self.lower, ritz.theta_min + ritz.rounding
        self.told(Bounds(k, self.goal.options.max_hvps, self.curvature.examples, bounds, self.lambda_max, threshold))

    def _settled(self, ritz: Ritz) -> bool:
        low, high = self.lambda_max
        if high - low > self.goal.options.sharpness * max(abs(low), abs(high)):
            return False
        verdict = self._judged(ritz.theta_min + ritz.rounding)
        if verdict is Verdict.SADDLE and ritz.residual > self.goal.options.tolerance * abs(ritz.theta_min):
            return False
        return verdict is not Verdict.UNDECIDED

    def _measure_direction(self, ritz: Ritz, v: Tensor) -> None:
        """v, its Rayleigh quotient and its residual: known from the recurrence if the basis is orthonormal and products
        are exact, else measured, and then the verdict is what the measurement says."""
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
    told: Told,
) -> CurvatureSearch | None:
    """Search on about `pilot_examples` examples, evenly spaced batches of them; collective.

    Returns the search if it has found a saddle of theirs. None if it has not, or if there are not eight times as many
    examples, or batches are too large to leave out seven of eight. Products are taken as `full` takes them, and cost
    at most about two over all examples.
    """
    curvature, search = full.curvature, goal.options
    examples = search.pilot_examples
    stride = curvature.examples // examples if examples else 0
    if stride < _PILOT_SHARE or _PILOT_SHARE * curvature.examples_of_every(stride) > curvature.examples:
        return None
    part = derivatives(every_nth(batches, stride))
    most = max(1, _PILOT_COST * curvature.examples // part.examples)
    goal = replace(goal, options=replace(search, max_hvps=min(search.max_hvps, most)))
    scout = CurvatureSearch(full.of(part), goal, told)
    try:
        scout.run()
    finally:
        curvature.passes += part.passes * part.examples / curvature.examples
    full.learn(scout.products)
    return scout if scout.verdict is Verdict.SADDLE else None
