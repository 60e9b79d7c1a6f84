"""Table 1 of the paper (Corollary 3.4): the costs of methods as sums of powers of d and epsilon with exact exponents.

The costs are orders of magnitude: every constant is 1 and logarithms are omitted. The improvement over uncompressed
training is computed from the communication costs (`Row.improvement`); `Row.printed` is the improvement in the paper.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from packsaddle.theory.bounds import LEAST

Powers = tuple[Fraction, Fraction]  # exponents of d and of epsilon


@dataclass(frozen=True)
class Order:
    """An order of magnitude: the sum, or with `least` the minimum, of monomials d^a epsilon^b."""

    terms: frozenset[Powers]
    least: bool = False

    def __call__(self, d: float, epsilon: float) -> float:
        values: list[float] = [d ** float(a) * epsilon ** float(b) for a, b in self.terms]
        return min(values) if self.least else sum(values)

    def __str__(self) -> str:
        terms = [_monomial(*powers) for powers in sorted(self.terms)]
        return f"min({', '.join(terms)})" if self.least and len(terms) > 1 else " + ".join(terms)

    def per(self, other: "Order") -> "Order":
        """Return the order of magnitude of the quotient of this order and `other`. This order must have a single term.
        The result is the minimum, over the terms of `other`, of this order's term divided by the term of `other`."""
        ((a, b),) = self.terms
        return Order(frozenset((a - c, b - e) for c, e in other.terms), least=len(other.terms) > 1)


def _order(*terms: tuple[float, float], least: bool = False) -> Order:
    return Order(frozenset((Fraction(a), Fraction(b)) for a, b in terms), least)


def _monomial(d: Fraction, epsilon: Fraction) -> str:
    above = [_power("d", d)] * (d > 0) + [_power("eps", epsilon)] * (epsilon > 0)
    below = [_power("d", -d)] * (d < 0) + [_power("eps", -epsilon)] * (epsilon < 0)
    divisor = f"({' '.join(below)})" if len(below) > 1 else "".join(below)
    return " ".join(above or ["1"]) + (f"/{divisor}" if below else "")


def _power(base: str, exponent: Fraction) -> str:
    return base if exponent == 1 else f"{base}^{float(exponent):g}"


@dataclass(frozen=True)
class Row:
    """One row of the paper's Table 1: a compressor, and its costs as orders of magnitude."""

    lipschitz: bool  # True if Assumption C holds
    compressor: str
    mu: Order | None  # contraction of the compressor; None: a constant c > 0
    iterations: Order
    communication: Order  # numbers sent per worker
    baseline: Order  # numbers sent per worker without compression
    printed: Order | None  # improvement over uncompressed training that the paper prints; None: the paper prints none

    @property
    def improvement(self) -> Order:
        return self.baseline.per(self.communication)

    @property
    def follows(self) -> bool:
        """True if the improvement that the paper prints follows from the paper's numbers for communication."""
        return self.printed is None or self.printed == self.improvement

    def possible(self, d: int, epsilon: float) -> bool:
        """Return True if the contraction mu of this row is k / d for a number k from 1 to d, or if mu is a constant. A
        compressor that sends k of d coordinates then has this contraction."""
        return self.mu is None or 1 <= self.mu(d, epsilon) * d <= d

    def plain(self, d: int, epsilon: float) -> dict[str, Any]:
        """Return the row as a dict of plain types, for JSON. It contains each cost as a formula, and as a number for
        this d and epsilon."""
        orders = {
            "mu": self.mu,
            "iterations": self.iterations,
            "communication": self.communication,
            "improvement": self.improvement,
            "printed_improvement": self.printed,
        }
        return {
            "lipschitz": self.lipschitz,
            "compressor": self.compressor,
            **{name: order and order(d, epsilon) for name, order in orders.items()},
            "formulas": {name: order and str(order) for name, order in orders.items()},
            "printed_follows": self.follows,
            "possible": self.possible(d, epsilon),
        }


def check_range(d: int, epsilon: float) -> None:
    """Raise ValueError unless Table 1 is defined for `d` and `epsilon`, and its values fit in a float64."""
    if not 1 <= d <= 1e15:
        raise ValueError(f"d must be from 1 to 1e15, got {d}")
    if not LEAST <= epsilon < 1:
        raise ValueError(f"epsilon must be at least {LEAST:g} and below 1 for the orders of Table 1, got {epsilon}")


def _setting(lipschitz: bool, rows: Iterable[tuple[str, Order | None, Order, Order, Order | None]]) -> tuple[Row, ...]:
    rows = list(rows)
    return tuple(Row(lipschitz, name, mu, t, bits, rows[0][3], printed) for name, mu, t, bits, printed in rows)


_ONE = _order((0, 0))
_CONSTANT_LIPSCHITZ = _order((0, -4), (1, -2.5))

TABLE_1: tuple[Row, ...] = (
    *_setting(
        True,
        [
            ("uncompressed [19]", _ONE, _order((0, -3.5)), _order((1, -3.5)), None),
            ("SketchTopK", _order((0.5, 0.75)), _order((0, -4)), _order((1.5, -3.25)), _order((-0.5, -0.25))),
            ("RandomK", _order((0, 0.75)), _order((0, -4)), _order((1, -3.25)), _order((0, -0.25))),
            ("constant", None, _CONSTANT_LIPSCHITZ, _CONSTANT_LIPSCHITZ, _order((1, 0), (0, -0.5), least=True)),
        ],
    ),
    *_setting(
        False,
        [
            ("uncompressed [25]", _ONE, _order((1, -4)), _order((2, -4)), None),
            ("SketchTopK", _order((0, 0.75)), _order((1, -4)), _order((2, -3.25)), _order((0, -0.75))),
            ("RandomK", _order((-0.5, 0.75)), _order((1, -4)), _order((1.5, -3.25)), _order((0.5, -0.75))),
            ("constant", None, _order((1, -4)), _order((1, -4)), _order((1, 0))),
        ],
    ),
)
