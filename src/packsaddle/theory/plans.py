"""Plans: the parameters of Algorithm 1 for a target accuracy, the bytes that a run with these parameters sends, and the
number k of coordinates per message for which these bytes are fewest."""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor, Identity, LinearSketch
from packsaddle.compressors.registry import CLASSES, describe
from packsaddle.compressors.sparse import KOfD
from packsaddle.theory.bounds import (
    GREATEST,
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

Family = Callable[[int], Compressor]  # maps k to the compressor that sends k coordinates


def _of_k(kind: type[KOfD], k: int) -> Compressor:
    return kind(k=k)


FAMILIES: Mapping[str, Family] = {
    **{name: partial(_of_k, kind) for name, kind in CLASSES.items() if issubclass(kind, KOfD)},
    "LinearSketch": lambda k: LinearSketch(columns=k),
}


@dataclass(frozen=True)
class Plan:
    """Parameters for `CompressedSGD(lr=eta, noise=noise, escape=Escape(interval, radius, ...))`, and their cost.

    The values are orders of magnitude (see `packsaddle.theory.bounds`). Exceptions are the contraction mu and the
    number k of coordinates sent, which are exact, and `sent`, which is exact except for the size of coded indices.
    Numbers of bytes are for one worker, and count the bytes that it sends. They do not include the bytes of the escape
    check. The escape check is made when the number of steps since the last check exceeds `interval`, or when these
    steps have moved the parameters by a distance above `radius`. It accepts these steps or rolls them back. If it
    accepts them, it all-reduces d uncompressed values.

    >>> from packsaddle import RandomK
    >>> from packsaddle.theory import Assumptions
    >>> from packsaddle.theory.plans import plan
    >>> found = plan(Assumptions(d=10_000, epsilon=0.2), RandomK(0.01))
    >>> found.name, found.sent
    ('RandomK(ratio=0.01)', 600)
    >>> f"{found.eta:.1e}", found.noise_suffices
    ('6.2e-08', True)
    """

    assumptions: Assumptions  # constants of the problem
    constants: Constants  # constants that replace O-tilde in the theorems
    workers: int  # number of workers W
    compressor: Compressor  # compressor C
    theorem: str  # number of the theorem in the paper: "3.2" for a linear compressor, else "3.1"
    protocol: str  # the exchange: "all-reduce", "all-gather", ...
    mu: float  # contraction of C on d coordinates
    k: int | None  # number of coordinates sent, or of a sketch's counters; None: not defined for this compressor
    eta: float  # step size
    bound_by: str  # bound that limits eta: "gradient noise", "first-order" or "second-order"
    steps: int  # number of steps T
    interval: int  # escape interval I, in steps
    radius: float  # radius R of the escape check
    noise: float  # standard deviation r of each coordinate of the noise xi, whose norm is about r sqrt(d)
    decrease: float  # decrease F of the objective f per escape
    sent: int  # bytes that one worker sends per step
    total: int  # bytes that one worker sends in all steps
    improvement: float  # total bytes of Algorithm 1 without compression, divided by `total`

    @property
    def name(self) -> str:
        """The compressor with its arguments, such as RandomK(ratio=0.01)."""
        return describe(self.compressor)

    @property
    def noise_norm(self) -> float:
        """The norm of the artificial noise, r sqrt(d), for noise of standard deviation r per coordinate. Compression
        errors stay below the noise only if this norm is at least about sigma, the standard deviation of the stochastic
        gradient."""
        return self.noise * math.sqrt(self.assumptions.d)

    @property
    def noise_suffices(self) -> bool:
        """True if the norm of the artificial noise is at least sigma, the standard deviation of the gradient."""
        return self.noise_norm >= self.assumptions.sigma

    @property
    def proved_for_workers(self) -> bool:
        """True if the exchange computes C(v), the compressed form, of the workers' mean vector v, as the proofs assume.
        It is False for an all-gather, which instead computes the mean of C(v_i), where v_i is the vector of
        worker i."""
        return self.protocol != "all-gather"

    def plain(self) -> dict[str, Any]:
        """Return the plan as plain types, for JSON, without assumptions and constants."""
        shown = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        derived = {"noise_norm": self.noise_norm, "noise_suffices": self.noise_suffices, "mode": self.constants.mode}
        first_order = asdict(first_order_plan(self.assumptions, self.mu))
        proved = {"proved_for_workers": self.proved_for_workers}
        return {**shown, "compressor": self.name, **derived, **proved, "first_order": first_order}


def plan(
    assumptions: Assumptions, compressor: Compressor, *, constants: Constants = PRACTICAL, workers: int = 4
) -> Plan:
    """Plan a run of Algorithm 1 with this compressor: by Theorem 3.2 if it is linear, else by Theorem 3.1.

    `assumptions` are the constants of the problem, and `constants` replace those that O-tilde hides in the theorems.
    The compressor acts on all d coordinates, in float32, with the direct exchange (which computes the exact mean of the
    workers' messages). Raises ValueError if the compressor does not support d coordinates, or for fewer than two
    workers, since one worker sends nothing.

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

    # The step size eta is the least of the theorem's three bounds. It determines the interval I
    # and the number of steps T.
    terms = step_sizes(a, c, mu, linear=linear)
    bound_by = min(terms, key=lambda name: terms[name])
    interval, steps = interval_and_steps(a, c, terms[bound_by])
    protocol, sent = _exchange(compressor, d, workers)

    # Compute the bytes that Algorithm 1 sends without compression. It then needs another number of steps.
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
    """Return the number k of coordinates to send, from 1 to d, for which two bounds on the step size, "gradient noise"
    and "second-order", are about equal (see `balanced_mu`).

    See `plan` for `assumptions` and `constants`. `family(k)` is the compressor that sends k coordinates.

    >>> from packsaddle import TopK
    >>> from packsaddle.theory import Assumptions
    >>> from packsaddle.theory.plans import balanced_k
    >>> balanced_k(Assumptions(d=10_000, epsilon=0.2), lambda k: TopK(k=k))
    367
    """
    mu = balanced_mu(assumptions, linear=family(1).linear, constants=constants)
    return min(assumptions.d, max(1, math.ceil(mu * assumptions.d)))


def best_plan(assumptions: Assumptions, family: Family, *, constants: Constants = PRACTICAL, workers: int = 4) -> Plan:
    """Return the plan of the compressor `family(k)` for the k that needs the fewest bytes in all steps. `family(k)` is
    the compressor that sends k coordinates.

    See `plan` for `assumptions`, `constants` and `workers`, and for the errors raised.

    Let k* be the smallest k for which the number of steps T is no larger than for k = d, i.e. without compression. For
    k below k*, compression limits the step size, and the product k T grows as k decreases. For k above k*, T is
    constant and each step sends more. So the minimum is at k*, at the smallest k with the next smaller contraction mu,
    or at k = d, which sends no indices. k* equals `balanced_k`, up to rounding, unless the first-order bound limits the
    step size, which Corollary 3.3 ignores. For LinearSketch, mu = 1 / ceil(d / k) is rounded. The search can then miss
    a k that needs fewer bytes, typically by a few percent.

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
    """Return the smallest k in 1, ..., d for which holds(k) is true. If holds(k) is true for some k, it must be true
    for all larger k. If it is true for no k below d, d is returned."""
    return bisect_left(range(1, d), True, key=holds) + 1


MOST_STEPS = 10**9  # steps of the longest feasible run, which takes twelve days at a thousand steps per second
_HALVINGS = 40  # number of bisections of an interval of log(epsilon); the interval is at most 92 long


@dataclass(frozen=True)
class Reach:
    """Numbers of steps of Algorithm 1 without compression: for the given assumptions, and for other assumptions that
    need fewer steps. With compression, the numbers of steps are the same or larger."""

    steps: int  # steps T without compression
    # Steps for the target 2 epsilon; None: every first-order stationary point is then also second-order stationary.
    at_twice_epsilon: int | None
    epsilon: float | None  # smallest target epsilon that needs at most MOST_STEPS steps; None: there is none
    with_lipschitz_gradient: int | None  # steps under Assumption C with l-tilde = L; None: already assumed

    @property
    def out_of_reach(self) -> bool:
        return self.steps > MOST_STEPS


def reach(a: Assumptions, constants: Constants) -> Reach:
    """Compute three numbers of steps of Algorithm 1 without compression: under the assumptions `a`, for twice the
    target epsilon of `a`, and with Assumption C (Lipschitz stochastic gradients) in addition. Also computes the
    smallest epsilon, at least that of `a`, that needs at most MOST_STEPS steps."""

    def steps(**easier: Any) -> int:
        b, c = replace(a, **easier), constants
        # The logarithm iota in the constants of the theory depends on the problem, so compute it anew.
        if c.mode == "theory":
            c = Constants.theory(b, c.failure_probability or 0.1)
        return _steps(b, c, Identity())

    greatest = min(a.smoothness**2 / a.hessian_lipschitz, GREATEST)
    return Reach(
        steps(),
        steps(epsilon=2 * a.epsilon) if 2 * a.epsilon <= greatest else None,
        _least_epsilon(lambda epsilon: steps(epsilon=epsilon) <= MOST_STEPS, a.epsilon, greatest),
        steps(lipschitz_gradient=a.smoothness) if a.lipschitz_gradient is None else None,
    )


def _least_epsilon(within: Callable[[float], bool], given: float, greatest: float) -> float | None:
    """Return the smallest epsilon in [given, greatest] for which `within` is True, or None if there is none. If
    `within` is True for some epsilon, it must be True for all larger ones. The result is found by bisection of
    log(epsilon)."""
    # Stay below the largest valid epsilon by more than rounding errors.
    low, high = math.log(given), math.log(greatest) - 1e-12
    if within(given):
        return given
    if high <= low or not within(math.exp(high)):
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if within(math.exp(middle)) else (middle, high)
    return math.exp(high)
