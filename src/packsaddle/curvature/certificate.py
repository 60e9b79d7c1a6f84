"""Certificates of second-order stationarity, and what those of iterates drawn from a run say of the whole run.

`certify` makes a certificate. Theorems 3.1 and 3.2 promise that at least half of x_0 ... x_T are epsilon-second-order
stationary, not that x_T is. If at least half are, m independent uniform draws all miss with probability at most 2^-m.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from packsaddle.numerics.seeds import Stream, generator


class Verdict(StrEnum):
    """The verdict of a certificate."""

    SECOND_ORDER_STATIONARY = "second-order stationary"
    SADDLE = "saddle"
    GRADIENT_TOO_LARGE = "gradient too large"
    UNDECIDED = "undecided"


def judge(least: float, most: float, epsilon: float, threshold: float, upper: float, lower: float) -> Verdict:
    """Compare the evidence with Definition 2.4: `least` and `most` bound ||grad f||, `upper` and `lower` lambda_min.

    A Rayleigh quotient below the threshold is proof of a saddle, whatever its residual.
    """
    if not least <= epsilon:
        return Verdict.GRADIENT_TOO_LARGE
    if most > epsilon:
        return Verdict.UNDECIDED
    if upper < threshold:
        return Verdict.SADDLE
    return Verdict.SECOND_ORDER_STATIONARY if lower >= threshold else Verdict.UNDECIDED


def proposed_epsilon(grad_norm: float, error: float | None, eps: float) -> float:
    """Return an epsilon where none is given: the least for which the gradient is small enough in spite of its error.

    That is its norm and twice its standard error (if there is one, and it is finite), rounded up to two digits; `eps`
    for a gradient of 0. At a smaller one the verdict would be about the gradient, and at a larger one a saddle of less
    curvature would pass.
    """
    most = grad_norm + (2 * error if error is not None and math.isfinite(error) else 0.0)
    if most <= 0:
        return eps
    digits = 1 - math.floor(math.log10(most))
    rounded = float(f"{most:.1e}")
    return rounded if rounded >= most else float(f"{most + 10.0**-digits:.1e}")


def for_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with None for each float that is not finite, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


@dataclass(frozen=True)
class Certificate:
    """The evidence at one point; the Hessian is that of the mean loss over `examples` examples, in eval mode."""

    verdict: Verdict  # on the point
    epsilon: float  # the gradient's threshold
    epsilon_proposed: bool  # none was given: the gradient's norm and twice its standard error, to two digits upwards
    loss: float
    grad_norm: float  # ||grad f||
    grad_norm_error: float | None  # standard error of the gradient, if the examples are a sample of more
    lambda_min_upper: float  # lambda_min is at most this: the escape direction's Rayleigh quotient, and rounding
    lambda_min_lower: float  # and at least this, less rounding, but for the failure probability; -inf after a pilot
    lambda_max_lower: float  # lambda_max is at least this: the largest Ritz value, less rounding; -inf after a pilot
    lambda_max_upper: float  # and at most this, but for the failure probability, which is each bound's own
    residual: float  # ||H v - lambda v|| for the escape direction v
    failure_probability: float  # of each bound that rests on the random start
    threshold: float  # -sqrt(rho epsilon)
    hessian_lipschitz: float  # rho
    hessian_lipschitz_estimated: bool  # rho was measured along v, not given: an estimate from below
    escape_direction: Tensor  # unit v, float64[d]; of a sharded model this worker's part
    sharpest_direction: Tensor | None  # unit Ritz vector of lambda_max, or of a pilot's; None if not kept
    slope: float  # <grad f, v>
    escape_distance: float | None  # of a saddle: s for which f(x + s v) is the lowest that was found
    escape_loss: float | None  # f(x + s v)
    escape_bend: float | None  # the most that [f(x + s v) + f(x - s v)] / 2 was found below f(x)
    ritz_values: tuple[float, ...]  # in rising order
    ritz_shares: tuple[float, ...]  # of the random start along each Ritz vector: a spectral density
    examples: int
    sample_of: int | None  # how many examples these were drawn from; None: they are all there are
    pilot_examples: int | None  # on which v was found, and Ritz values are of these; None: the search was on all
    pilot_hvps: int  # products over them
    precision: str  # of the products; recurrences are in double precision
    hvp: str  # how products were taken: "double backward" or "differences of gradients"
    hvp_reason: str | None  # why not by double backward, where it was tried
    hvp_error: float  # what a product of a unit vector may be wrong by, supposed and measured; taken off both bounds
    hvp_step: float | None  # h of the differences, the last one
    hvps: int  # Hessian-vector products over the examples
    backward_passes: int  # over the examples, a pilot's by its share; two a product by double backward
    bytes_sent: int  # by this worker
    seconds: float  # for all of it

    @property
    def smallest_epsilon(self) -> float:
        """The smallest epsilon for which this point would be certified with this rho."""
        below = max(0.0, -self.lambda_min_lower)
        return max(self.grad_norm, below * below / self.hessian_lipschitz)

    @property
    def saddle_below_rho(self) -> float | None:
        """With a rho below this the point would be a saddle: lambda_min_upper^2 / epsilon; None if no negative
        curvature was found."""
        return self.lambda_min_upper**2 / self.epsilon if self.lambda_min_upper < 0 else None

    def escape_steps(self, lr: float) -> float | None:
        """Return the steps in which SGD's distance from here along v grows tenfold.

        They are ln(10) / ln(1 + lr |lambda|) for lambda = lambda_min_upper. With momentum m, lr is over 1 - m. Returns
        None if lr is 0 or no negative curvature was found. Raises ValueError if lr is negative or not finite.
        """
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be finite and not negative, got {lr}")
        return math.log(10) / math.log1p(-lr * self.lambda_min_upper) if lr and self.lambda_min_upper < 0 else None

    @property
    def whose(self) -> str:
        """The function whose Hessian it is."""
        named = "" if self.sample_of is None else f", a sample of {self.sample_of:,}"
        return f"the mean loss over {self.examples:,} examples{named}, in evaluation mode"

    @property
    def _how(self) -> str:
        """The error of differences, and why they were taken."""
        if self.hvp_step is None:
            return ""
        why = "" if self.hvp_reason is None else f"; no double backward: {self.hvp_reason}"
        return f" (h = {self.hvp_step:.1e}; off by {self.hvp_error:.1e}, in both bounds{why})"

    @property
    def _whence(self) -> str:
        """The proposed epsilon and its reason, where none was given."""
        if not self.epsilon_proposed:
            return ""
        error = self.grad_norm_error
        more = "" if error is None or not 0 < error < math.inf else " and twice its standard error"
        return f" (none was given: the gradient's norm{more}, so that the curvature decides)"

    def to_dict(self, lr: float | None = None) -> dict[str, Any]:
        """Return everything but the directions as plain types, for JSON, which has no infinity: None.

        `escape_steps` are those of the step size `lr`, None without one.
        """
        directions = ("escape_direction", "sharpest_direction")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in directions}
        values |= {"verdict": str(self.verdict), "smallest_epsilon": self.smallest_epsilon, "whose": self.whose}
        values |= {"saddle_below_rho": self.saddle_below_rho, "lr": lr}
        values["escape_steps"] = None if lr is None else self.escape_steps(lr)
        return for_json(values)

    def __str__(self) -> str:
        # Definition 2.4: ||grad f|| <= epsilon, and lambda_min >= -sqrt(rho epsilon).
        is_plateau = self.verdict is Verdict.SECOND_ORDER_STATIONARY and self.saddle_below_rho is not None
        error = ""
        if self.grad_norm_error is not None:
            known = math.isfinite(self.grad_norm_error)
            error = f" (standard error {f'{self.grad_norm_error:.1e}' if known else 'unknown: one batch'})"
        lines = [
            f"{self.verdict}{', not a minimum' if is_plateau else ''}",
            f"gradient norm {self.grad_norm:.3e}{error}, epsilon {self.epsilon:.3e}{self._whence}",
            *self._curvature(),
            *self._remarks(),
            f"loss {self.loss:.6f}; the Hessian is that of {self.whose}",
            f"{self.hvps} product{'' if self.hvps == 1 else 's'} in {self.precision} by {self.hvp}{self._how}, "
            f"{self.bytes_sent:,} bytes sent, {self.seconds:.1f} s",
        ]
        return "\n  ".join(lines)

    def _curvature(self) -> list[str]:
        """The bounds on both extreme eigenvalues, or the one that a pilot's direction gives, and the threshold."""
        if self.verdict is Verdict.GRADIENT_TOO_LARGE and len(self.ritz_values) == 1:  # for the record
            return ["curvature was not looked at: the gradient decides"]
        if self.pilot_examples is None:
            bounds = [
                f"lambda_min in [{self.lambda_min_lower:.3e}, {self.lambda_min_upper:.3e}], from below with "
                f"probability {1 - self.failure_probability:g}, residual {self.residual:.1e}",
                f"lambda_max in [{self.lambda_max_lower:.3e}, {self.lambda_max_upper:.3e}], from above with the same "
                f"probability",
            ]
        else:
            bounds = [
                f"lambda_min is at most {self.lambda_min_upper:.3e}, by a direction found on {self.pilot_examples:,} "
                f"examples with {self.pilot_hvps} products"
            ]
        value = f"{self.hessian_lipschitz:.3e}" if self.hessian_lipschitz > 1e-300 else "about 0: quadratic along v"
        given = "estimated along v, from below" if self.hessian_lipschitz_estimated else "given"
        return [*bounds, f"threshold -sqrt(rho epsilon) = {self.threshold:.3e}, rho {value} ({given})"]

    def _remarks(self) -> list[str]:
        """The lines that the verdict needs: f(x + s v), the gap between the bounds, or what the verdict leaves open."""
        if self.escape_distance is not None and self.escape_loss is not None and self.escape_bend is not None:
            fall = self.loss - self.escape_loss
            found = f"falls by {fall:.3e}" if fall > 0 else "does not fall"
            bend = "" if self.escape_bend > 0 else "; their mean does not fall (kinks? finite steps see no saddle)"
            return [f"a step of {self.escape_distance:.3g} along v: the loss {found}{bend}"]
        if self.verdict is Verdict.UNDECIDED:
            gap = self.lambda_min_upper - self.lambda_min_lower
            return [f"more products may settle it: the bounds are {gap:.1e} apart"]
        if self.verdict is not Verdict.SECOND_ORDER_STATIONARY:
            return []

        # Definition 2.4 asks for little where rho is large, and rho measured from below may be too small.
        below, lines = self.saddle_below_rho, []
        if self.hessian_lipschitz_estimated:
            other = "a smaller one asks for more" if below is None else f"below rho = {below:.1e} this is a saddle"
            lines.append(
                f"it rests on the estimate of rho: {other}; a larger one lowers the threshold, and allows more "
                f"negative curvature"
            )
        if below is not None:
            plateau = f"v has curvature {self.lambda_min_upper:.1e}, which the threshold allows, as on a plateau"
            lines.append(f"not a minimum: {plateau}")
        return lines


def draw_iterates(m: int, steps: int, seed: int) -> list[int]:
    """Return m independent uniform draws from 0 ... T for T = `steps`, in rising order (some may be equal).

    The same for the same `seed`.
    """
    return sorted(torch.randint(steps + 1, (m,), generator=generator(seed, 0, Stream.ITERATES)).tolist())


@dataclass(frozen=True)
class Share:
    """Bounds from m certificates on the share of a run's iterates that are second-order stationary."""

    drawn: int  # m
    stationary: int  # certified
    refuted: int  # saddles and large gradients; the rest are undecided

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Share":
        """Count verdicts."""
        stationary = sum(v is Verdict.SECOND_ORDER_STATIONARY for v in verdicts)
        refuted = sum(v in (Verdict.SADDLE, Verdict.GRADIENT_TOO_LARGE) for v in verdicts)
        return cls(len(verdicts), stationary, refuted)

    @property
    def all_fail(self) -> float:
        """2^-m: if at least half of the iterates are second-order stationary, no draw is with at most this
        probability."""
        return 0.5**self.drawn

    @property
    def surprise(self) -> float:
        """If at least half of the iterates are second-order stationary, so few draws are (undecided ones counted as
        stationary) with at most this probability: small values speak against the theorem's promise."""
        from scipy.special import bdtr  # slow to import, and only this needs it

        return float(bdtr(self.drawn - self.refuted, self.drawn, 0.5))

    def at_least(self, confidence: float = 0.95) -> float:
        """A lower confidence bound on the share (Clopper and Pearson's, one-sided), certificates assumed true: each
        may be wrong with its own failure probability."""
        if self.stationary == 0:
            return 0.0
        from scipy.special import betaincinv  # slow to import, and only this needs it

        return float(betaincinv(self.stationary, self.drawn - self.stationary + 1, 1 - confidence))

    def __str__(self) -> str:
        return (
            f"{self.stationary} of {self.drawn} iterates drawn uniformly are certified second-order stationary, "
            f"{self.refuted} are not, {self.drawn - self.stationary - self.refuted} undecided.\n"
            f"Share of the run: at least {self.at_least():.0%} with confidence 95%. If it is at least half, as "
            f"Theorems 3.1 and 3.2 promise,\nall {self.drawn} draws fail with probability at most {self.all_fail:.2g}, "
            f"and as many as here with at most {self.surprise:.2g}."
        )
