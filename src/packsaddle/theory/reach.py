"""The reach of plans: whether anyone can take their steps, and what would have to change where nobody can."""

import math
from dataclasses import dataclass, replace

from packsaddle.compressors import Identity
from packsaddle.theory.bounds import Assumptions, Constants
from packsaddle.theory.plan import plan

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
        """Whether even the fewest steps are too many."""
        return self.steps > MOST_STEPS


def reach(a: Assumptions, constants: Constants) -> Reach:
    """Return how far away a plan is, and what its steps would be on easier terms."""
    steps = _steps(a, constants)
    greatest = a.smoothness**2 / a.hessian_lipschitz
    twice = _steps(replace(a, epsilon=2 * a.epsilon), constants) if 2 * a.epsilon <= greatest else None
    assumed = replace(a, lipschitz_gradient=a.smoothness)
    return Reach(
        steps,
        twice,
        _least_epsilon(a, constants, greatest),
        _steps(assumed, constants) if a.lipschitz_gradient is None else None,
    )


def _steps(a: Assumptions, constants: Constants) -> int:
    return plan(a, Identity(), constants=_constants(a, constants)).steps


def _constants(a: Assumptions, constants: Constants) -> Constants:
    """The same kind of constants; a theory's logarithm is of the problem."""
    if constants.mode == "practical":
        return constants
    return Constants.theory(a, constants.failure_probability or 0.1)


def _least_epsilon(a: Assumptions, constants: Constants, greatest: float) -> float | None:
    """Steps fall as epsilon grows, so halve the interval between an epsilon that has too many and one that has not."""
    low, high = math.log(a.epsilon), math.log(greatest) - 1e-12  # inside what rounding allows
    if _steps(a, constants) <= MOST_STEPS:
        return a.epsilon
    if high <= low or _steps(replace(a, epsilon=math.exp(high)), constants) > MOST_STEPS:
        return None
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        within = _steps(replace(a, epsilon=math.exp(middle)), constants) <= MOST_STEPS
        low, high = (low, middle) if within else (middle, high)
    return math.exp(high)
