"""The linear recursion of perturbed SGD near a saddle of curvature -gamma, in closed form.

Along the unstable direction x_{t+1} = (1 + eta gamma) x_t - eta xi_t, with step size eta and noise xi_t. So a distance
from the saddle, or between two runs, grows like (1 + eta gamma)^t, with a prefactor set by the noise.
"""

import math
from itertools import pairwise

from packsaddle.errors import check_positive

_MEDIAN_OF_ABSOLUTE_NORMAL = 0.6744897501960817
_NEGLIGIBLE = 45.0  # exp(-45) is negligible


def growth_rate(eta: float, gamma: float, mu: float = 1.0) -> float:
    """Return the exponential growth rate per step near a saddle of curvature -gamma, for the step size eta.

    Without compression (mu = 1) it is ln(1 + eta gamma).

    With RandomK and error feedback (mu = k/d) and a saddle whose unstable direction is a coordinate axis, x_1 moves
    only when coordinate 1 is sent, after T steps with probability mu (1 - mu)^(T-1), and then by T updates together:
    x_1 <- (1 + eta gamma T) x_1. So the rate is exactly mu E ln(1 + eta gamma T), which is ln(1 + eta gamma) up to a
    factor 1 - O(eta gamma / mu): the slowdown vanishes as eta -> 0, as Theorem 3.2 predicts. The mean over T is an
    integral, by ln(1 + z) = int_0^inf (1 - exp(-z s)) exp(-s) / s ds (Frullani). Raises ValueError unless eta and gamma
    are positive and mu in (0, 1].

    >>> from lab.paper.proof import growth_rate
    >>> round(growth_rate(0.1, 1.0), 4), round(growth_rate(0.1, 1.0, mu=0.1), 4)
    (0.0953, 0.0606)
    """
    check_positive(eta=eta, gamma=gamma)
    if not 0 < mu <= 1:
        raise ValueError(f"mu must be in (0, 1], got {mu}")
    if mu == 1:
        return math.log1p(eta * gamma)
    from scipy.integrate import quad  # slow to import, and only compressed runs need it

    # mu E ln(1 + c T) by Frullani's integral, with s = exp(u).
    c = eta * gamma

    def integrand(u: float) -> float:  # value at s = exp(u): exp(-s) (1 - E exp(-c T s))
        s = math.exp(u)
        left = -math.expm1(-c * s)
        return math.exp(-s) * left / (left + mu * math.exp(-c * s))

    turn = min(math.log(mu / c), 0.0)  # below this u the integrand falls like s
    pieces = (turn - _NEGLIGIBLE, turn, math.log(_NEGLIGIBLE))
    return mu * sum(float(quad(integrand, a, b, epsabs=0.0, epsrel=1e-12, limit=200)[0]) for a, b in pairwise(pieces))


def predicted_escape_time(eta: float, gamma: float, noise: float, radius: float, mu: float = 1.0) -> float:
    """Return the median number of steps from a saddle to distance R: ln(R sqrt(2 gamma / eta) / (0.6745 r)) / rate.

    The unstable coordinate is Gaussian with std r sqrt(eta / (2 gamma)) (1 + eta gamma)^t, and 0.6745 is the median
    of |N(0, 1)|. Assumes one unstable direction, eta gamma << 1, and R well above the noise of the first steps. `noise`
    is the std r of a coordinate, `radius` is R, and `rate` is `growth_rate(eta, gamma, mu)`. Raises ValueError unless
    all are positive.

    >>> from lab.paper.proof import predicted_escape_time
    >>> round(predicted_escape_time(0.1, 1.0, noise=0.01, radius=0.5), 1)
    60.9
    """
    check_positive(eta=eta, gamma=gamma, noise=noise, radius=radius)
    amplification = radius * math.sqrt(2 * gamma / eta) / (_MEDIAN_OF_ABSOLUTE_NORMAL * noise)
    return max(0.0, math.log(amplification)) / growth_rate(eta, gamma, mu)
