"""Theorems 3.1 and 3.2 of the paper in numbers: assumptions, the constants that O-tilde hides, step sizes, and numbers
of steps.

The theorems hide constants and logarithms in O-tilde. `Constants.theory` replaces them with those that Jin et al. (JACM
2021, Eq. (8)) prove for uncompressed SGD. `Constants.practical` replaces them with values that are derived for one
saddle at a time. So the results are *orders of magnitude*. Only the plan of `first_order_plan` is proved with the
constants that it uses.
"""

import math
from dataclasses import dataclass, fields
from typing import Literal

from packsaddle.errors import check_positive

Mode = Literal["practical", "theory"]
_MEDIAN_OF_ABSOLUTE_NORMAL = 0.6744897501960817
# The smallest and the largest valid constant of a problem. Products of powers of such constants fit in a float64.
LEAST, GREATEST = 1e-20, 1e20


@dataclass(frozen=True)
class Assumptions:
    """The constants of the problem in the paper's Assumptions A and B, and in C if `lipschitz_gradient` is given.

    Raises ValueError for a constant that is out of range, and unless L >= sqrt(rho epsilon).

    Args:
        d: Number of parameters of the model (coordinates of x), such as 25M, 25e6 or 25000000.
        epsilon: Target, an epsilon-SOSP: ||grad f|| <= epsilon and lambda_min >= -sqrt(rho epsilon).
        smoothness: L, the Lipschitz constant of the gradient of f.
        hessian_lipschitz: rho, the Lipschitz constant of the Hessian.
        sigma: Standard deviation of the stochastic gradient as a whole vector: E||grad F - grad f||^2 <= sigma^2.
        f_max: Largest difference |f(x) - f(y)|.
        lipschitz_gradient: l-tilde, the Lipschitz constant of every stochastic gradient (Assumption C); by
            default it is not assumed.

    >>> from packsaddle.theory import Assumptions
    >>> a = Assumptions(d=1_000_000, epsilon=0.2, lipschitz_gradient=1.0)
    >>> round(a.curvature, 3)
    0.447
    """

    d: int
    epsilon: float
    smoothness: float = 1.0
    hessian_lipschitz: float = 1.0
    sigma: float = 1.0
    f_max: float = 1.0
    lipschitz_gradient: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.d, int) or not 1 <= self.d <= 1e15:
            raise ValueError(f"d must be an integer from 1 to 1e15, got {self.d!r}")
        if not 0 <= self.sigma <= GREATEST:
            raise ValueError(f"sigma must be from 0 to {GREATEST:g}, got {self.sigma}")
        for name in ("epsilon", "smoothness", "hessian_lipschitz", "f_max", "lipschitz_gradient"):
            value = getattr(self, name)
            if value is not None and not LEAST <= value <= GREATEST:
                raise ValueError(f"{name} must be positive, from {LEAST:g} to {GREATEST:g}, got {value}")
        if self.curvature > self.smoothness:
            raise ValueError(
                f"smoothness must be at least sqrt(hessian_lipschitz * epsilon) = {self.curvature:g}, else every "
                f"epsilon-FOSP is an epsilon-SOSP; got {self.smoothness:g}"
            )

    @property
    def curvature(self) -> float:
        """The magnitude of the negative curvature that must be escaped, sqrt(rho epsilon)."""
        return math.sqrt(self.hessian_lipschitz * self.epsilon)

    @property
    def noise_ratio(self) -> float:
        """The ratio N of gradient noise (Jin et al. 2021, Eq. (8)). It is about sigma^2 / epsilon^2 under Assumption C,
        and about d sigma^2 / epsilon^2 without Assumption C."""
        relative = (self.sigma / self.epsilon) ** 2
        if self.lipschitz_gradient is None:
            return 1 + relative * self.d
        lipschitz = self.lipschitz_gradient**2 / (self.smoothness * self.curvature)
        return 1 + min(relative + lipschitz, relative * self.d)


@dataclass(frozen=True)
class Constants:
    """The constants that Theorems 3.1 and 3.2 hide in O-tilde: constant factors, and powers of a logarithm called iota.

    The defaults are from the proof for uncompressed SGD (Jin et al. 2021, Eq. (8)). It is an assumption that they are
    also valid, up to logarithms, for Algorithm 1. The factors `first_order_factor` and `second_order_factor`, both 1,
    are guesses. The constants that `practical` returns have no proof and no failure probability, but lead to feasible
    numbers of steps. Raises ValueError unless all constants are positive and finite.

    >>> from packsaddle.theory import Assumptions, Constants
    >>> c = Constants.theory(Assumptions(d=1000, epsilon=0.1))
    >>> c.mode, c.iota > 1
    ('theory', True)
    """

    mode: Mode  # origin of the constants, "theory" or "practical"
    iota: float  # value of the logarithm iota
    failure_probability: float | None = None  # failure probability delta in the logarithm iota; None: not defined
    eta_power: float = 9.0  # the step size eta is proportional to iota^-eta_power
    gradient_noise_factor: float = 1.0  # factor of the bound 1 / (L N) on the step size eta (see `step_sizes`)
    first_order_factor: float = 1.0  # factor of the bound mu epsilon / (L chi sqrt(1 - mu)) on the step size eta
    second_order_factor: float = 1.0  # factor of the bound mu^2 sqrt(rho epsilon) / ((1 - mu) L^2 D) on eta
    noise_power: float = 1.0  # power of iota in the norm of the noise, iota^1 epsilon sqrt(N)
    interval_power: float = 1.0  # power of iota in I = iota^1 / (eta sqrt(rho epsilon)); not used with `patience`
    patience: float | None = None  # I is at least this times the median escape time; None: see `interval_power`
    radius_power: float = 2.0  # power of 1 / iota in the radius R = 2 iota^-2 sqrt(epsilon / rho)
    radius_factor: float = 2.0  # factor 2 in the radius R = 2 iota^-2 sqrt(epsilon / rho)
    decrease_power: float = 5.0  # power of 1 / iota in the decrease F = 1 iota^-5 sqrt(epsilon^3 / rho)
    decrease_factor: float = 1.0  # factor 1 in the decrease F = 1 iota^-5 sqrt(epsilon^3 / rho)
    escape_factor: float = 100.0  # factor of I / F in the steps T = f_max max(100 I / F, 100 / (eta epsilon^2))
    descent_factor: float = 100.0  # factor of 1 / (eta epsilon^2) in T = f_max max(100 I / F, 100 / (eta epsilon^2))

    def __post_init__(self) -> None:
        check_positive(**{f.name: getattr(self, f.name) for f in fields(self)[1:]})

    @classmethod
    def theory(cls, a: Assumptions, failure_probability: float = 0.1, log_factor: float = 1.0) -> "Constants":
        """Return the constants of the proof, with iota = log_factor * log(d L f_max N / (rho epsilon delta)).

        The docstring of `Assumptions`, the class of `a`, defines d, L, f_max, rho and epsilon. N is `a.noise_ratio`,
        and delta is `failure_probability`. The argument of the logarithm has units, as in the paper, so the logarithm
        can be small or negative. If it is below 1, it is replaced by the logarithm of a number without units,
        d N max(1, L f_max / epsilon^2) (L / sqrt(rho epsilon)) / delta, or by 1 if the other logarithm is also below 1.
        The proof only states that `log_factor` is "sufficiently large". Its default, 1, is optimistic. Raises
        ValueError unless 0 < delta < 1.
        """
        if not 0 < failure_probability < 1:
            raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability}")
        n, delta, descent = a.noise_ratio, failure_probability, a.smoothness * a.f_max
        logarithm = math.log(a.d * descent * n / (a.hessian_lipschitz * a.epsilon * delta))
        if logarithm < 1:
            unitless = a.d * n * max(1.0, descent / a.epsilon**2) * (a.smoothness / a.curvature) / delta
            logarithm = max(1.0, math.log(unitless))
        return cls("theory", log_factor * logarithm, failure_probability)

    @classmethod
    def practical(cls) -> "Constants":
        """Return constants for which half of the iterates are epsilon-second-order stationary, if escapes from saddles
        take the predicted time.

        At no more than a quarter of the iterates the gradient is too large. This holds because the first two bounds on
        the step size eta are below the bounds of `first_order_plan` for the target epsilon / 2, since
        chi^2 <= 2 epsilon^2 N. Here chi^2 is the variance of the sum of a step's gradient and artificial noise, and N
        is `Assumptions.noise_ratio`. For the target epsilon / 2, T = 32 f_max / (eta epsilon^2) steps provably suffice.

        No more than a quarter of the iterates are near saddles. An escape takes I steps, which is at least twice the
        predicted median time of an escape (see `interval_and_steps`). It decreases the objective f by F. If the Hessian
        is rho-Lipschitz, f decreases by at least 2/3 sqrt(epsilon^3 / rho) over the distance R, the radius of the
        escape check. So T = 4 f_max I / F steps suffice.

        The value 1 of `second_order_factor` remains a guess. The logarithm iota is 1.
        """
        return cls(
            "practical",
            1.0,
            gradient_noise_factor=1 / 64,
            first_order_factor=1 / (8 * math.sqrt(2)),
            patience=2.0,
            decrease_factor=2 / 3,
            escape_factor=4.0,
            descent_factor=32.0,
        )


PRACTICAL = Constants.practical()


def step_sizes(a: Assumptions, c: Constants, mu: float, *, linear: bool) -> dict[str, float]:
    """Return the three bounds on the step size eta in Theorems 3.1 and 3.2, by name; eta is their minimum.

    The names are "gradient noise", "first-order" and "second-order". With units restored, the bounds are 1 / (L N),
    mu epsilon / (L chi sqrt(1 - mu)) and mu^2 sqrt(rho epsilon) / ((1 - mu) L^2 D). Each is multiplied by its factor in
    `c` and by iota to the power -`c.eta_power`. Here `mu` is the contraction of the compressor, D is 1 if the
    compressor is `linear` and d if it is not, and chi^2 = sigma^2 + ||xi||^2, where xi is the artificial noise. N is
    `a.noise_ratio`. The docstring of `Assumptions`, the class of `a`, defines L, epsilon, rho, sigma and d.
    """
    chi = math.hypot(a.sigma, noise_norm(a, c))
    lost = 1 - mu
    first = mu * a.epsilon / (a.smoothness * chi * math.sqrt(lost)) if lost else math.inf
    second = mu**2 * a.curvature / (lost * a.smoothness**2 * (1 if linear else a.d)) if lost else math.inf
    terms = {
        "gradient noise": c.gradient_noise_factor / (a.smoothness * a.noise_ratio),
        "first-order": c.first_order_factor * first,
        "second-order": c.second_order_factor * second,
    }
    return {name: term * c.iota**-c.eta_power for name, term in terms.items()}


def noise_norm(a: Assumptions, c: Constants) -> float:
    """Return the approximate norm of the artificial noise xi, iota epsilon sqrt(N), with the power of iota in `c`. Jin
    et al. (2021) call this norm r."""
    return float(c.iota**c.noise_power) * a.epsilon * math.sqrt(a.noise_ratio)


def interval_and_steps(a: Assumptions, c: Constants, eta: float) -> tuple[int, int]:
    """Return two numbers of steps for the step size eta: the escape interval I, in which a saddle is left, and the
    total number T. `a` are the assumptions, and `c` the constants."""
    if c.patience is None:
        interval = math.ceil(c.iota**c.interval_power / (eta * a.curvature))
    else:
        # Along the escape direction, y = x - eta e (the parameters x corrected by the error memory e) is Gaussian after
        # t steps, with the standard deviation r sqrt(eta / (2 gamma)) (1 + eta gamma)^t. Here r is the noise per
        # coordinate, and gamma the magnitude of the negative curvature. So the median time to distance R is the t at
        # which 0.6745 times this standard deviation is R.
        noise, gamma = noise_norm(a, c) / math.sqrt(a.d), a.curvature
        growth = radius(a, c) * math.sqrt(2 * gamma / eta) / (_MEDIAN_OF_ABSOLUTE_NORMAL * noise)
        # The median time is 0 if the noise alone reaches the distance R, i.e. if `growth` is at most 1.
        predicted = max(0.0, math.log(growth)) / math.log1p(eta * gamma)
        interval = math.ceil(c.patience * max(predicted, 1 / (eta * gamma)))
    longest = max(c.escape_factor * interval / decrease(a, c), c.descent_factor / (eta * a.epsilon**2))
    return interval, math.ceil(a.f_max * longest)


def radius(a: Assumptions, c: Constants) -> float:
    """Return the radius R of the escape check, i.e. the distance from the saddle at which an escape is complete."""
    return float(c.radius_factor * c.iota**-c.radius_power) * math.sqrt(a.epsilon / a.hessian_lipschitz)


def decrease(a: Assumptions, c: Constants) -> float:
    """Return F, the least decrease of the objective f in an escape from a saddle."""
    return float(c.decrease_factor * c.iota**-c.decrease_power) * math.sqrt(a.epsilon**3 / a.hessian_lipschitz)


def balanced_mu(assumptions: Assumptions, *, linear: bool, constants: Constants = PRACTICAL) -> float:
    """Return the contraction mu, in (0, 1), for which two bounds on the step size in `step_sizes` are equal: the first,
    "gradient noise", and the third, "second-order" (Corollary 3.3 of the paper).

    This mu solves mu^2 / (1 - mu) = q, where q is the first bound divided by the factors of the third bound that do not
    contain mu. If q is small, mu is about sqrt(q). For a compressor that is `linear`, sqrt(q) is
    epsilon^(3/4) / sqrt(alpha), where alpha is 1 under Assumption C and d without it. For a compressor that is not
    linear, sqrt(q) is sqrt(d) times this number. `assumptions` and `constants` are the arguments `a` and `c` of
    `step_sizes`.
    """
    half = step_sizes(assumptions, constants, 0.5, linear=linear)  # for mu = 1/2, mu^2 / (1 - mu) is 1/2
    q = half["gradient noise"] / (2 * half["second-order"])
    # This is the positive root of mu^2 + q mu - q = 0, in a form without cancellation.
    return 2 / (1 + math.sqrt(1 + 4 / q))


@dataclass(frozen=True)
class FirstOrderPlan:
    """Step size and number of steps for which the mean of E||grad f(x_t)||^2 over the steps t is at most epsilon^2.

    x_t are the parameters at step t.

    >>> from packsaddle.theory import Assumptions, first_order_plan
    >>> found = first_order_plan(Assumptions(d=1000, epsilon=0.1), mu=1.0)
    >>> found.steps, found.bound_by
    (640000, 'gradient noise')
    """

    eta: float  # step size
    steps: int  # number of steps T
    bound_by: str  # condition that limits eta: "smoothness", "error feedback", "gradient noise" or "first-order"


def first_order_plan(assumptions: Assumptions, mu: float, *, noise: float = 0.0) -> FirstOrderPlan:
    """Return a plan for first-order stationarity only, without resets of the error memory. The plan, including its
    constants, is proved under Assumptions A and B.

    At step t the parameters are x_t, the error memory is e_t, and each coordinate has artificial noise of standard
    deviation `noise`. Let chi^2 = sigma^2 + d noise^2. The proof uses the descent lemma for y_t = x_t - eta e_t, and a
    bound on E||e_t||^2 (as in Lemma A.5 of the paper). For eta <= 1/(4L) and eta <= mu / (4 L sqrt(1 - mu)) they give

    mean ||grad f||^2 <= 4 f_max / (eta T) + 2 chi^2 (L eta + 4 L^2 eta^2 (1 - mu) / mu^2).

    T is chosen so that the first term is at most epsilon^2 / 2, and eta so that each of the other two terms is at most
    epsilon^2 / 4. The compressor C must act on the mean over workers. `mu` is the contraction of C, in (0, 1]. L,
    sigma, d, epsilon and f_max are those of `assumptions`; rho and l-tilde are not used.

    >>> from packsaddle.theory import Assumptions, first_order_plan
    >>> first_order_plan(Assumptions(d=1000, epsilon=0.1), mu=0.01)
    FirstOrderPlan(eta=0.00017766726362967536, steps=4502800, bound_by='first-order')
    """
    a, smooth, lost = assumptions, assumptions.smoothness, 1 - mu
    chi = math.hypot(a.sigma, math.sqrt(a.d) * noise)
    terms = {
        "smoothness": 1 / (4 * smooth),
        "error feedback": mu / (4 * smooth * math.sqrt(lost)) if lost else math.inf,
        "gradient noise": a.epsilon**2 / (8 * smooth * chi**2) if chi else math.inf,
        "first-order": mu * a.epsilon / (4 * math.sqrt(2 * lost) * smooth * chi) if lost and chi else math.inf,
    }
    bound_by = min(terms, key=lambda name: terms[name])
    return FirstOrderPlan(terms[bound_by], math.ceil(8 * a.f_max / (terms[bound_by] * a.epsilon**2)), bound_by)
