"""Plans: parameters of Algorithm 1 for a target accuracy, the bytes they cost, and the k that costs the fewest.

Exact are mu, k and (but for coded indices) the bytes of a step; the rest is of the order of magnitude that
`packsaddle.theory` describes. The reach of a plan tells whether its steps can be taken at all, and what would have to
change where they cannot.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Identity, LinearSketch, RandomK, SharedTopK, SketchTopK, TopK
from packsaddle.compressors.registry import describe
from packsaddle.compressors.sparse import KOfD
from packsaddle.theory.bounds import (
    PRACTICAL,
    Assumptions,
    Constants,
    balanced_mu,
    decrease,
    first_order_plan,
    interval_and_steps,
    noise_norm,
    radius,
    step_sizes,
)

Family = Callable[[int], Compressor]  # the compressor that sends k coordinates

FAMILIES: Mapping[str, Family] = {
    "RandomK": lambda k: RandomK(k=k),
    "TopK": lambda k: TopK(k=k),
    "SketchTopK": lambda k: SketchTopK(k=k),
    "SharedTopK": lambda k: SharedTopK(k=k),
    "LinearSketch": lambda k: LinearSketch(columns=k),
}


@dataclass(frozen=True)
class Plan:
    """Parameters for `CompressedSGD(lr=eta, noise=noise, escape=Escape(interval, radius, ...))`, and what they cost.

    Orders of magnitude, but for mu, k and `sent`. Bytes are one worker's, up; the escape check's and its resets'
    are not in them (a dense all-reduce per commit, so at most d / I values a step).

    >>> from packsaddle import RandomK
    >>> from packsaddle.theory import Assumptions
    >>> from packsaddle.theory.plans import plan
    >>> found = plan(Assumptions(d=10_000, epsilon=0.2), RandomK(0.01))
    >>> found.name, found.sent
    ('RandomK(ratio=0.01)', 600)
    >>> f"{found.eta:.1e}", found.noise_suffices
    ('6.2e-08', True)
    """

    assumptions: Assumptions  # of the problem
    constants: Constants  # in place of O-tilde
    workers: int  # W
    compressor: Compressor  # C
    theorem: str  # "3.2" for a linear compressor, else "3.1"
    protocol: str  # the exchange: "all-reduce", "all-gather", ...
    mu: float  # of C on d coordinates
    k: int | None  # coordinates (or counters) sent, where the compressor has such a number
    eta: float  # step size
    bound_by: str  # the term of eta that is least: "gradient noise", "first-order" or "second-order"
    steps: int  # T
    interval: int  # I
    radius: float  # R
    noise: float  # r per coordinate, as everywhere here: the norm of xi is about noise * sqrt(d), Jin et al.'s r
    decrease: float  # F: what f falls by per escape
    sent: int  # bytes per step
    total: int  # bytes in all
    improvement: float  # the total of Algorithm 1 without compression, divided by this total

    @property
    def name(self) -> str:
        """The compressor as it is written."""
        return describe(self.compressor)

    @property
    def noise_norm(self) -> float:
        """The norm of xi, r sqrt(d): compression errors stay below the noise only if it is about sigma or more."""
        return self.noise * math.sqrt(self.assumptions.d)

    @property
    def noise_suffices(self) -> bool:
        """True if the norm of xi is at least sigma."""
        return self.noise_norm >= self.assumptions.sigma

    @property
    def proved_for_workers(self) -> bool:
        """True if C acts on the workers' mean, as in the proofs; a mean of C's (all-gather) is outside them."""
        return self.protocol != "all-gather"

    def plain(self) -> dict[str, Any]:
        """Return the plan as plain types, for JSON; assumptions and constants aside."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        derived = {"noise_norm": self.noise_norm, "noise_suffices": self.noise_suffices, "mode": self.constants.mode}
        first_order = asdict(first_order_plan(self.assumptions, self.mu))
        proved = {"proved_for_workers": self.proved_for_workers}
        return {**shown, "compressor": self.name, **derived, **proved, "first_order": first_order}


def plan(
    assumptions: Assumptions, compressor: Compressor, *, constants: Constants = PRACTICAL, workers: int = 4
) -> Plan:
    """Plan a run with this compressor: Theorem 3.2 if it is linear, else Theorem 3.1.

    `assumptions` are those of the problem, `constants` what O-tilde hides. The compressor acts on all d coordinates, in
    single precision, over the direct exchange. Raises ValueError if it cannot, or if there are fewer than two workers,
    which send nothing.

    >>> from packsaddle import TopK
    >>> from packsaddle.theory import Assumptions
    >>> from packsaddle.theory.plans import plan
    >>> found = plan(Assumptions(d=10_000, epsilon=0.2), TopK(0.01))
    >>> found.theorem, found.k, found.steps > 1000
    ('3.1', 100, True)
    """
    a, c, d = assumptions, constants, assumptions.d
    if workers < 2:
        raise ValueError(f"workers must be at least 2 (one worker sends nothing), got {workers}")
    mu, linear = compressor.mu(d), compressor.linear

    # eta is the least of the theorem's three terms; I and T follow from it.
    terms = step_sizes(a, c, mu, linear=linear)
    bound_by = min(terms, key=lambda name: terms[name])
    interval, steps = interval_and_steps(a, c, terms[bound_by])
    protocol, sent = _exchange(compressor, d, workers)

    # Bytes of Algorithm 1 without compression, over all of its own steps.
    dense = _exchange(Identity(), d, workers)[1] * _steps(a, c, Identity())
    return Plan(
        assumptions=a,
        constants=c,
        workers=workers,
        compressor=compressor,
        theorem="3.2" if linear else "3.1",
        protocol=protocol,
        mu=mu,
        k=_count(compressor, d),
        eta=terms[bound_by],
        bound_by=bound_by,
        steps=steps,
        interval=interval,
        radius=radius(a, c),
        noise=noise_norm(a, c) / math.sqrt(d),
        decrease=decrease(a, c),
        sent=sent,
        total=sent * steps,
        improvement=dense / (sent * steps),
    )


def _exchange(compressor: Compressor, d: int, workers: int) -> tuple[str, int]:
    """The protocol and the bytes that one worker sends in a step."""
    choice = choose(compressor, "direct", d=d, dense=0, workers=workers)
    return choice.name, choice.aggregator.wire(d, 0, 1, workers, 4).sent


def _count(compressor: Compressor, d: int) -> int | None:
    if isinstance(compressor, KOfD):
        return compressor.count(d)
    if isinstance(compressor, LinearSketch):
        return compressor.width(d)
    return d if isinstance(compressor, Identity) else None


def _steps(a: Assumptions, c: Constants, compressor: Compressor) -> int:
    eta = min(step_sizes(a, c, compressor.mu(a.d), linear=compressor.linear).values())
    return interval_and_steps(a, c, eta)[1]


def balanced_k(assumptions: Assumptions, family: Family, *, constants: Constants = PRACTICAL) -> int:
    """Return Corollary 3.3's k, from 1 to d: the coordinates of balanced mu = k / d.

    `assumptions` and `constants` are those of `plan`; `family(k)` is the compressor of k coordinates.

    >>> from packsaddle import TopK
    >>> from packsaddle.theory import Assumptions
    >>> from packsaddle.theory.plans import balanced_k
    >>> balanced_k(Assumptions(d=10_000, epsilon=0.2), lambda k: TopK(k=k))
    367
    """
    mu = balanced_mu(assumptions, linear=family(1).linear, constants=constants)
    return min(assumptions.d, max(1, math.ceil(mu * assumptions.d)))


def best_plan(assumptions: Assumptions, family: Family, *, constants: Constants = PRACTICAL, workers: int = 4) -> Plan:
    """Plan with the k of least total bytes: about the smallest k that takes no more steps than k = d.

    `family(k)` is the compressor of k coordinates; `assumptions`, `constants`, `workers` and ValueError are as in
    `plan`. With fewer coordinates a compression's term of eta binds, and k T grows as k falls; with more, T stays and
    each step costs more. So the least is at this k, at the next smaller mu, or at k = d, which needs no indices. It is
    `balanced_k`, unless the first-order term, which Corollary 3.3 leaves out, binds longer, or whole steps and
    coordinates round. (For a LinearSketch, whose mu is 1 / ceil(d / k), rounding can hide a better k: by a few percent,
    by 13% at d = 7.)

    >>> from packsaddle import RandomK
    >>> from packsaddle.theory import Assumptions
    >>> from packsaddle.theory.plans import best_plan
    >>> best_plan(Assumptions(d=10_000, epsilon=0.2), lambda k: RandomK(k=k)).k
    4
    """
    a, d = assumptions, assumptions.d
    least = _steps(a, constants, family(d))
    free = _first(lambda k: _steps(a, constants, family(k)) <= least, d)
    mu = family(max(1, free - 1)).mu(d)
    cheaper = _first(lambda k: family(k).mu(d) >= mu, d)
    return min(
        (plan(a, family(k), constants=constants, workers=workers) for k in (free, cheaper, d)), key=lambda p: p.total
    )


def _first(holds: Callable[[int], bool], d: int) -> int:
    """The smallest of 1, ..., d that holds, if all after it do."""
    return bisect_left(range(1, d), True, key=holds) + 1


MOST_STEPS = 10**9  # twelve days at a thousand steps a second
_HALVINGS = 40  # of the interval of epsilon in logarithms, which is 92 at most


@dataclass(frozen=True)
class Reach:
    """The steps of the plan without compression, than which no compressor's has fewer."""

    steps: int
    at_twice_epsilon: int | None  # None: every first-order stationary point is one of second order there
    epsilon: float | None  # the least with MOST_STEPS or fewer; None: the greatest has more
    with_lipschitz_gradient: int | None  # under Assumption C with l-tilde = L; None where it holds already

    @property
    def out_of_reach(self) -> bool:
        """True if even the fewest steps are too many."""
        return self.steps > MOST_STEPS


def reach(a: Assumptions, constants: Constants) -> Reach:
    """Return how far away a plan is, and what its steps would be on easier terms."""

    def steps(**easier: Any) -> int:
        b, c = replace(a, **easier), constants
        if c.mode == "theory":  # whose logarithm depends on the problem
            c = Constants.theory(b, c.failure_probability or 0.1)
        return _steps(b, c, Identity())

    greatest = a.smoothness**2 / a.hessian_lipschitz
    return Reach(
        steps(),
        steps(epsilon=2 * a.epsilon) if 2 * a.epsilon <= greatest else None,
        _least_epsilon(lambda epsilon: steps(epsilon=epsilon) <= MOST_STEPS, a.epsilon, greatest),
        steps(lipschitz_gradient=a.smoothness) if a.lipschitz_gradient is None else None,
    )


def _least_epsilon(within: Callable[[float], bool], given: float, greatest: float) -> float | None:
    """Bisect in log(epsilon) for the least epsilon with few enough steps, which fall as it grows."""
    low, high = math.log(given), math.log(greatest) - 1e-12  # inside what rounding allows
    if within(given):
        return given
    if high <= low or not within(math.exp(high)):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if within(math.exp(middle)) else (middle, high)
    return math.exp(high)
