"""Certificates of second-order stationarity, and bounds on the fraction of a run's iterates that are stationary.

A point is epsilon-second-order stationary if its gradient norm is at most epsilon and its smallest Hessian eigenvalue
is at least -sqrt(rho epsilon), where rho is the Lipschitz constant of the Hessian (Definition 2.4 of the paper).
`certify` returns a certificate. If no epsilon is given, the verdict is only on the curvature, since every point is
stationary for a sufficiently large epsilon.

Theorems 3.1 and 3.2 promise that at least half of the iterates x_0 ... x_T are epsilon-second-order stationary. They do
not promise that the last iterate x_T is. If at least half are stationary, m iterates drawn independently and uniformly
are all non-stationary with probability at most 2^-m.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from enum import StrEnum
from html import escape
from typing import Any

import torch
from torch import Tensor

from packsaddle.numerics.seeds import Stream, generator

_BAR = 24  # length of the longest bar of the chart of losses
_WITHOUT_EPSILON = "no verdict on stationarity without epsilon (--epsilon), the threshold of the gradient norm"


class Verdict(StrEnum):
    """The verdict of a certificate on a point.

    It follows from the gradient norm, whose threshold is epsilon, and from the smallest Hessian eigenvalue. If no
    epsilon is given, the verdict follows from the sign of the eigenvalue alone. It is then `NOT_A_MINIMUM`,
    `NO_NEGATIVE_CURVATURE` or `UNDECIDED`.
    """

    SECOND_ORDER_STATIONARY = "second-order stationary"
    SADDLE = "saddle"
    GRADIENT_TOO_LARGE = "gradient too large"
    NOT_A_MINIMUM = "not a minimum"
    NO_NEGATIVE_CURVATURE = "no negative curvature"
    UNDECIDED = "undecided"

    @property
    def rests_on_negative_curvature(self) -> bool:
        """True if negative curvature proves the verdict, i.e. for `SADDLE` and `NOT_A_MINIMUM`."""
        return self in (Verdict.SADDLE, Verdict.NOT_A_MINIMUM)


def threshold_of(epsilon: float | None, rho: float) -> float | None:
    """Return -sqrt(rho epsilon), the threshold for the smallest Hessian eigenvalue. A point is a saddle if this
    eigenvalue is below the threshold.

    `epsilon` is the threshold for the gradient norm, and rho is the Lipschitz constant of the Hessian. Returns None if
    `epsilon` is None.
    """
    return None if epsilon is None else -math.sqrt(rho * epsilon)


def judge(grad_norm: float, epsilon: float | None, rho: float, lower: float, upper: float) -> Verdict:
    """Return the verdict from the gradient norm and from bounds on the smallest Hessian eigenvalue, lambda_min
    (`lower`, `upper`).

    The gradient norm is compared with epsilon, and lambda_min with -sqrt(rho epsilon), where rho is the Lipschitz
    constant of the Hessian (Definition 2.4 of the paper). Without epsilon lambda_min is compared with 0.
    """
    if epsilon is None:
        if upper < 0:
            return Verdict.NOT_A_MINIMUM
        return Verdict.NO_NEGATIVE_CURVATURE if lower >= 0 else Verdict.UNDECIDED
    if grad_norm > epsilon:
        return Verdict.GRADIENT_TOO_LARGE
    threshold = -math.sqrt(rho * epsilon)
    if upper < threshold:
        return Verdict.SADDLE
    return Verdict.SECOND_ORDER_STATIONARY if lower >= threshold else Verdict.UNDECIDED


@dataclass(frozen=True)
class Certificate:
    """The verdict on one point, and its evidence.

    f is the mean loss over the examples, in eval mode, and H its Hessian at the point x. lambda_min and lambda_max are
    the smallest and the largest eigenvalue of H. The escape direction v is the unit vector with the smallest curvature
    that was found.

    The loss along v is evaluated at several points x + s v if the verdict is `SADDLE` or `NOT_A_MINIMUM`.
    `sharpest_direction` is not available after a single Lanczos step, or if not all Lanczos vectors were stored.
    `failure_probability` is over the random start vector of Lanczos.

    If v was found on a sample of the examples (`sample_examples`) and proved on all of them, lambda_min has no lower
    bound (-inf) and lambda_max no bounds, and the Ritz values are those of the sample. A certificate without a search,
    or one that was stopped, may have no direction either: then the fields on v are None or inf. A search is left out if
    it would exceed `Search.seconds`, or if the gradient is too large without `Search.always`.
    """

    verdict: Verdict
    epsilon: float | None  # threshold for the gradient norm; None: not given, so the verdict is on the curvature alone
    loss: float
    grad_norm: float  # norm of the gradient of the mean loss, ||grad f||
    grad_norm_error: float | None  # sampling error of the gradient, as a standard error; None: `sample_of` is None
    lambda_min_upper: float  # upper bound on lambda_min: Rayleigh quotient v^T H v of `escape_direction` plus its error
    lambda_min_lower: float  # lower bound on lambda_min; -inf: none
    lambda_max_lower: float  # lower bound on lambda_max: largest Ritz value minus error; -inf: none
    lambda_max_upper: float  # upper bound on lambda_max; inf: none
    residual: float  # ||H v - lambda v|| for the escape direction v and its Rayleigh quotient lambda = v^T H v
    failure_probability: float  # largest probability that `lambda_min_lower` is wrong; the same for `lambda_max_upper`
    threshold: float | None  # threshold for lambda_min, -sqrt(rho epsilon); None: epsilon or rho is None
    hessian_lipschitz: float | None  # rho, the Lipschitz constant of the Hessian; None: not measured
    hessian_lipschitz_estimated: bool  # True if rho was measured along the escape direction, as a lower bound on rho
    escape_direction: Tensor | None  # escape direction v, unit vector float64[d]; None: none was found
    sharpest_direction: Tensor | None  # unit Ritz vector of the largest Ritz value, float64[d]; None: not available
    slope: float | None  # <grad f, v>, derivative of the loss along the escape direction v; None: no v
    escape_distance: float | None  # s, positive or negative, with the lowest f(x + s v) found; None: no s was tried
    escape_loss: float | None  # loss f(x + s v) at s = `escape_distance`; None: not evaluated
    escape_bend: float | None  # largest f(x) - [f(x + s v) + f(x - s v)] / 2 over all s tried; None: none was tried
    along_v: tuple[tuple[float, float], ...]  # pairs (s, f(x + s v)); over the sample if v was found on a sample
    ritz_values: tuple[float, ...]  # Ritz values of the Hessian (eigenvalues approximated by Lanczos), ascending
    ritz_shares: tuple[float, ...]  # squared inner product of each Ritz vector with the unit start vector of Lanczos
    examples: int  # number of examples in the mean loss f
    sample_examples: int | None  # number of examples on which v was found; None: on all, or none was found
    sample_hvps: int  # number of Hessian-vector products over these; 0 if `sample_examples` is None
    sample_of: int | None  # size of the data set that was sampled; None: not given, or all its examples were used
    precision: str  # dtype of the model, in which Hessian-vector products are computed, e.g. "float32"
    hvp: str  # method of the Hessian-vector products: "double backward" or "differences of gradients"
    hvp_reason: str | None  # error by which double backward failed; None: it did not fail, or was not tried
    hvp_error: float  # estimated error of a Hessian-vector product with a unit vector, included in all bounds
    hvp_step: float | None  # last step h of the differences of gradients; None: double backward was used
    hvps: int  # number of Hessian-vector products over all examples, and of those by a float64 copy of the model
    backward_passes: int  # number of backward passes over all examples; one over a part counts as a fraction
    searched: bool  # False: no search for negative curvature, since the gradient decides the verdict
    postponed: float | None  # expected seconds of a search that was left out; None: nothing was left out
    stopped: bool  # True if Ctrl-C or `Search.seconds` ended the search
    bytes_sent: int  # number of bytes that this worker sent for the certificate
    seconds: float  # duration of the certification

    @property
    def smallest_epsilon(self) -> float:
        """The smallest epsilon for which the bounds in this certificate prove second-order stationarity.

        rho, the Lipschitz constant of the Hessian, is assumed to be `hessian_lipschitz`. The value is inf if there is
        no lower bound on lambda_min.
        """
        below = max(0.0, -self.lambda_min_lower)
        return max(self.grad_norm, below * below / self.hessian_lipschitz) if self.hessian_lipschitz else math.inf

    @property
    def saddle_below_rho(self) -> float | None:
        """The limit lambda_min_upper^2 / epsilon for rho, the Lipschitz constant of the Hessian. The point is a saddle
        if rho is below the limit.

        The limit is None if no epsilon was given, or if no negative curvature was found.
        """
        return None if self.epsilon is None or self.lambda_min_upper >= 0 else self.lambda_min_upper**2 / self.epsilon

    def escape_steps(self, lr: float) -> float | None:
        """Return the number of SGD steps in which the distance from this point along `escape_direction` grows tenfold.

        The number is ln(10) / ln(1 + lr |lambda|), where lambda is `lambda_min_upper`, and `lr` is the learning rate.
        For SGD with momentum m, pass the learning rate divided by 1 - m. Returns None if lr is 0 or no negative
        curvature was found. Raises ValueError if lr is negative or not finite.
        """
        if not 0 <= lr < math.inf:
            raise ValueError(f"lr must be finite and not negative, got {lr}")
        return math.log(10) / math.log1p(-lr * self.lambda_min_upper) if lr and self.lambda_min_upper < 0 else None

    @property
    def answer(self) -> str:
        """The verdict in a sentence, with the numbers from which it follows."""
        upper, lower = f"{self.lambda_min_upper:.2g}", f"{self.lambda_min_lower:.2g}"
        sure = f"with probability {1 - self.failure_probability:g}"
        match self.verdict:
            case Verdict.SADDLE:
                return f"This is a saddle: along v the curvature is at most {upper}, {self._by_a_step()}."
            case Verdict.NOT_A_MINIMUM:
                return f"This is not a minimum: along v the curvature is at most {upper}, {self._by_a_step()}."
            case Verdict.SECOND_ORDER_STATIONARY:
                plateau = ", but not a minimum" if self.lambda_min_upper < 0 else ""
                limits = f"the gradient is at most epsilon, and {sure} no curvature is below {self.threshold:.2g}"
                return f"This point is second-order stationary{plateau}: {limits}."
            case Verdict.NO_NEGATIVE_CURVATURE:
                return f"There is no negative curvature here: {sure} every curvature is at least {lower}."
            case Verdict.GRADIENT_TOO_LARGE:
                size = f"the gradient's norm is {self.grad_norm:.2g}, above epsilon = {self.epsilon:.2g}"
                return f"This point is not stationary: {size}, so the loss still falls along the gradient."
        return f"This is undecided: {self._why_undecided()}."

    def _by_a_step(self) -> str:
        if self.escape_distance is None or self.escape_loss is None:
            return "and the loss along v was not computed"
        fall = self.loss - self.escape_loss
        by = f"lowers the loss by {fall:.3g}" if fall > 0 else "does not lower the loss"
        return f"and a step of {self.escape_distance:.2g} along it {by}"

    def _why_undecided(self) -> str:
        if math.isinf(self.lambda_min_upper):
            return "the search was stopped before it found anything" if self.stopped else "nothing was found"
        if math.isinf(self.lambda_min_lower):
            return f"along v the curvature is at most {self.lambda_min_upper:.2g}, which decides nothing"
        return f"the smallest curvature is between {self.lambda_min_lower:.2g} and {self.lambda_min_upper:.2g}"

    @property
    def loss_name(self) -> str:
        """A description of the certified loss, with the number of examples: "the mean loss over 512 examples, in
        evaluation mode"."""
        named = "" if self.sample_of is None else f", a sample of {self.sample_of:,}"
        return f"the mean loss over {self.examples:,} example{'s' * (self.examples != 1)}{named}, in evaluation mode"

    def to_dict(self, lr: float | None = None) -> dict[str, Any]:
        """Return the certificate as a dict of plain types for JSON.

        It has all fields except `escape_direction` and `sharpest_direction`, and the properties `smallest_epsilon`,
        `saddle_below_rho`, `answer` and `loss_name`. It also has `lr`, and `escape_steps` for this learning rate,
        which is None if lr is None.
        """
        directions = ("escape_direction", "sharpest_direction")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in directions}
        values |= {"verdict": str(self.verdict), "smallest_epsilon": self.smallest_epsilon, "loss_name": self.loss_name}
        values |= {"answer": self.answer, "saddle_below_rho": self.saddle_below_rho, "lr": lr}
        values["escape_steps"] = None if lr is None else self.escape_steps(lr)
        values["along_v"] = [(s, loss if math.isfinite(loss) else None) for s, loss in self.along_v]
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        # List the quantities compared by Definition 2.4: ||grad f|| <= epsilon, and lambda_min >= -sqrt(rho epsilon).
        error = differences = ""
        if self.grad_norm_error is not None:
            is_known = math.isfinite(self.grad_norm_error)
            error = f" (standard error {f'{self.grad_norm_error:.1e}' if is_known else 'unknown: one batch'})"
        limit = "" if self.epsilon is None else f", epsilon {self.epsilon:.3e}"
        if self.hvp_step is not None:
            why = "" if self.hvp_reason is None else f"; no double backward: {self.hvp_reason}"
            differences = f" (h = {self.hvp_step:.1e}; off by {self.hvp_error:.1e}, in both bounds{why})"
        lines = [
            self.answer,
            *self._chart(),
            f"gradient norm {self.grad_norm:.3e}{error}{limit}",
            *self._curvature(),
            *self._remarks(),
            *([] if self.epsilon is not None else [_WITHOUT_EPSILON]),
            f"loss {self.loss:.6f}; the Hessian is that of {self.loss_name}",
            f"{self.hvps} product{'' if self.hvps == 1 else 's'} in {self.precision} by {self.hvp}"
            f"{differences}, {self.bytes_sent:,} bytes sent, {self.seconds:.1f} s",
        ]
        return "\n  ".join(lines)

    def _chart(self) -> list[str]:
        """Draw how far the loss falls or rises along v, a line for each distance."""
        losses = [(s, loss) for s, loss in self.along_v if math.isfinite(loss)]
        if len(losses) < 3:
            return []
        middle = next(loss for s, loss in losses if s == 0)
        farthest = 1.01 * abs(self.escape_distance or math.inf)
        changes = [(s, loss - middle) for s, loss in losses if abs(s) <= farthest]
        most = max(abs(change) for _, change in changes) or 1.0
        shown = [(s, change) for s, change in changes if abs(change) >= most / (2 * _BAR) or not s]
        whose = "" if self.sample_examples is None else f", over {self.sample_examples:,} of the examples"
        rows = [f"the loss along v, less that at this point{whose}:"]
        for s, change in shown:
            bar = "█" * round(_BAR * abs(change) / most)
            sides = f"{bar if change < 0 else '':>{_BAR}}│{bar if change > 0 else '':{_BAR}}"
            rows.append(f"  {s:+9.2g}  {sides} {change:+.2e}")
        return rows

    def _repr_html_(self) -> str:
        """Return the sentence, the loss along v as a drawing, and the numbers, for a notebook."""
        first, *others = str(self).split("\n")
        numbers = "\n".join(line for line in others if "│" not in line and not line.startswith("  the loss along v"))
        return f"<p><b>{escape(first)}</b></p>{self._drawing()}<pre>{escape(numbers)}</pre>"

    def _drawing(self) -> str:
        losses = [(s, loss) for s, loss in self.along_v if math.isfinite(loss)]
        far = 4 * abs(self.escape_distance or 0.0)
        losses = [(s, loss) for s, loss in losses if abs(s) <= far]
        if len(losses) < 3:
            return ""
        low, high = min(loss for _, loss in losses), max(loss for _, loss in losses)
        reach, rise = max(abs(s) for s, _ in losses), (high - low) or 1.0
        at = [f"{240 + 230 * s / reach:.1f},{130 - 115 * (loss - low) / rise:.1f}" for s, loss in losses]
        x, y = next(place for place, (s, _) in zip(at, losses, strict=True) if s == 0).split(",")
        return (
            '<svg viewBox="0 0 480 170" width="480" role="img" aria-label="loss along v" style="max-width:100%">'
            f'<polyline points="{" ".join(at)}" fill="none" stroke="#2a7ab8" stroke-width="2"/>'
            f'<circle cx="{x}" cy="{y}" r="4" fill="#c1440e"/>'
            '<g fill="currentColor" font-size="12" font-family="sans-serif" text-anchor="middle">'
            f'<text x="{x}" y="150">this point, loss {self.loss:.4g}</text>'
            f'<text x="30" y="165">{-reach:.2g}</text><text x="450" y="165">{reach:.2g} along v</text></g></svg>'
        )

    def _curvature(self) -> list[str]:
        if not self.searched or self.escape_direction is None:
            return []
        rho = self.hessian_lipschitz
        value = "unknown" if rho is None else f"{rho:.3e}" if rho > 1e-300 else "about 0: quadratic along v"
        given = (
            ""
            if rho is None
            else " (estimated along v, from below)"
            if self.hessian_lipschitz_estimated
            else " (given)"
        )
        threshold = "" if self.threshold is None else f"threshold -sqrt(rho epsilon) = {self.threshold:.3e}, "
        found = f"lambda_min is at most {self.lambda_min_upper:.3e}, residual {self.residual:.1e}"
        if self.sample_examples is not None:
            found += f"; v was found on {self.sample_examples:,} examples with {self.sample_hvps} products"
        bounds = (
            [found]
            if math.isinf(self.lambda_min_lower)
            else [
                f"lambda_min in [{self.lambda_min_lower:.3e}, {self.lambda_min_upper:.3e}], from below with "
                f"probability {1 - self.failure_probability:g}, residual {self.residual:.1e}",
                f"lambda_max in [{self.lambda_max_lower:.3e}, {self.lambda_max_upper:.3e}], from above with the same "
                f"probability",
            ]
        )
        return [*bounds, f"{threshold}rho {value}{given}"]

    def _remarks(self) -> list[str]:
        if not self.searched:
            more = f"search=Search(always=True) looks for it, in about {self.postponed or 0:.0f} s"
            return [f"whether there is negative curvature too was not searched: {more}"]
        if self.escape_distance is not None and self.escape_loss is not None and self.escape_bend is not None:
            fall = self.loss - self.escape_loss
            found = f"falls by {fall:.3e}" if fall > 0 else "does not fall"
            kinks = "; their mean does not fall (kinks? finite steps see no negative curvature)"
            bend = "" if self.escape_bend > 0 else kinks
            lines = [f"a step of {self.escape_distance:.3g} along v: the loss {found}{bend}"]
            if self.hessian_lipschitz_estimated and (most := self.saddle_below_rho) is not None:
                lines.append(f"a saddle for every rho below {most:.1e}; the estimate is a lower bound, so give a rho")
            return lines
        if self.verdict is Verdict.UNDECIDED:
            if self.postponed is not None:
                more = f"bounds over all {self.examples:,} examples may settle it"
                limit = f"would take about {self.postponed:.0f} s, so they need search=Search(seconds=...) of as much"
                return [f"{more}; they {limit}"]
            if self.stopped:
                return ["the search was stopped; more time may settle it"]
            gap = self.lambda_min_upper - self.lambda_min_lower
            return [f"more products may settle it: the bounds are {gap:.1e} apart"]
        if self.verdict is not Verdict.SECOND_ORDER_STATIONARY:
            return []

        # Explain how the verdict depends on rho. A large rho makes Definition 2.4 weak, and a measured rho may be too
        # small.
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
    """Return the sorted indices of m iterates, drawn uniformly from 0 ... `steps` with replacement. The draw is seeded
    by `seed`, so equal arguments give equal indices."""
    return sorted(torch.randint(steps + 1, (m,), generator=generator(seed, 0, Stream.ITERATES)).tolist())


@dataclass(frozen=True)
class Share:
    """Bounds on the fraction of a run's iterates that are second-order stationary, from m certificates."""

    drawn: int  # m, number of iterates drawn and certified
    stationary: int  # number of iterates certified as second-order stationary
    refuted: int  # number of iterates certified as saddles or with a too large gradient; the rest are undecided

    @classmethod
    def of(cls, verdicts: Sequence[Verdict]) -> "Share":
        """Return the counts of stationary, refuted and undecided iterates, from the verdicts of m certificates."""
        stationary = sum(v is Verdict.SECOND_ORDER_STATIONARY for v in verdicts)
        refuted = sum(v in (Verdict.SADDLE, Verdict.GRADIENT_TOO_LARGE) for v in verdicts)
        return cls(len(verdicts), stationary, refuted)

    @property
    def all_fail(self) -> float:
        """2^-m for the m iterates drawn.

        If at least half of the run's iterates are second-order stationary, this is an upper bound on the probability
        that none of the m iterates is.
        """
        return 0.5**self.drawn

    @property
    def surprise(self) -> float:
        """A p-value for the claim of Theorems 3.1 and 3.2, by which at least half of the run's iterates are
        second-order stationary.

        If the claim holds, the number of stationary iterates among the m drawn is at most m - `refuted` with at most
        this probability. Undecided iterates count as stationary.
        """
        from scipy.special import bdtr  # imported here because it is slow to import

        return float(bdtr(self.drawn - self.refuted, self.drawn, 0.5))

    def at_least(self, confidence: float = 0.95) -> float:
        """Return a lower bound on the fraction of the run's iterates that are second-order stationary.

        The bound holds with probability `confidence` over the draw (Clopper-Pearson, one-sided). The failure
        probabilities of the certificates are not included.
        """
        if self.stationary == 0:
            return 0.0
        from scipy.special import betaincinv  # imported here because it is slow to import

        return float(betaincinv(self.stationary, self.drawn - self.stationary + 1, 1 - confidence))

    def __str__(self) -> str:
        return (
            f"{self.stationary} of {self.drawn} iterates drawn uniformly are certified second-order stationary, "
            f"{self.refuted} are not, {self.drawn - self.stationary - self.refuted} undecided.\n"
            f"Share of the run: at least {self.at_least():.0%} with confidence 95%. If it is at least half, as "
            f"Theorems 3.1 and 3.2 promise,\nall {self.drawn} draws fail with probability at most {self.all_fail:.2g}, "
            f"and as many as here with at most {self.surprise:.2g}."
        )
