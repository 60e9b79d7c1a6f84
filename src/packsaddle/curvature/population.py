"""A certificate for the population loss f(x) = E f(x, z), the expected loss over the examples z of a population. It is
computed from n examples drawn from the population.

Batches are independent draws. The n_b examples of batch b have mean gradient g_b and Hessian H_b, and the n examples of
all B batches have mean gradient g_n and Hessian H_n. Bounds for the population's gradient g and Hessian H follow from
the variation between batches:

gradient    ||g_n - g|| <= s (1 + sqrt(2 log(1 / delta))) for a Gaussian vector of covariance C with s^2 = tr C
            (Borell's inequality, and ||C|| <= tr C); s^2 is measured as sum_b n_b ||g_b - g_n||^2 / ((B - 1) n).
upper bound v is found on every second batch and measured on the B' other batches, which are independent of v: the
            v^T H_b v have expected value v^T H v >= lambda_min(H), so lambda_min(H) is at most their mean plus
            Student's t-quantile for B' - 1 degrees of freedom times its standard error, plus the error of the products.
lower bound lambda_min(H) >= lambda_min(H_n) - lambda_max(H_n - H), and for a symmetric Gaussian matrix Z of mean 0 the
            largest eigenvalue exceeds t with probability d exp(-t^2 / (2 ||E Z^2||)) at most (Tropp, Found. Comput.
            Math. 12, 2012, theorem 4.1), so it is at most sqrt(2 ||E Z^2|| log(d / delta)).
            E Z^2 is measured as sum_b n_b (H_b - H_n)^2 / ((B - 1) n), and its norm is bounded from above by Lanczos.

Three assumptions are made. Batches are independent draws from the population; batches drawn without replacement from a
finite population vary less. Means over batches are nearly Gaussian, which needs many batches. The true variances equal
the measured ones.

The certificate consists of five statements, each of which fails with at most a fifth of the failure probability. So the
probability that any of them fails is at most the failure probability.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.group import resolve
from packsaddle.curvature.certificate import Verdict, for_json, headline_of, judge, threshold_of
from packsaddle.curvature.hessian import Curvature, LossFn, certifying, every_nth, with_examples
from packsaddle.curvature.lanczos import Ritz
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Products, choose_products, lanczos_over, with_products
from packsaddle.errors import check_positive

_STATEMENTS = 5
_FEWEST_BATCHES = 8
_STEPS = 40  # maximum number of Lanczos steps in the search for v, and in the search for the lower bound
_VARIANCE_STEPS = 24
# The search for the norm of the Hessian's variance stops once its upper bound is at most this multiple of its largest
# Ritz value.
_CLOSE = 1.5
# Approximate maximum number of Hessian-vector products in one call of `certify_population`.
MOST_PRODUCTS = 2 * _STEPS + 3 * _VARIANCE_STEPS


@dataclass(frozen=True)
class PopulationCertificate:
    """Bounds on the gradient's norm and on the Hessian's smallest eigenvalue for the population loss, and a verdict.

    The population loss is the expected loss over the population from which the examples were drawn. g is its gradient,
    and H its Hessian. g_n and H_n are the gradient and the Hessian of the mean loss over the n examples. v is the
    escape direction. All bounds hold together with probability 1 - `failure_probability`.
    """

    verdict: Verdict
    epsilon: float | None  # threshold for the gradient norm; None: not given, so the verdict is on the curvature alone
    hessian_lipschitz: float  # rho, the Lipschitz constant of the Hessian
    hessian_lipschitz_estimated: bool  # True if rho was measured along v on the examples, as a lower bound on rho
    threshold: float | None  # threshold for lambda_min(H), -sqrt(rho epsilon); None: no epsilon was given
    grad_norm: float  # norm of the gradient of the mean loss over the examples, ||g_n||
    grad_norm_lower: float  # lower bound on the norm of the population's gradient, ||g||
    grad_norm_upper: float  # upper bound on the norm of the population's gradient, ||g||
    quotient: float  # estimate of v^T H v: the mean Rayleigh quotient over the batches that were not used to find v
    quotient_error: float  # standard error of `quotient`
    lambda_min_upper: float  # upper bound on the smallest eigenvalue of the population's Hessian, lambda_min(H)
    lambda_min_lower: float  # lower bound on lambda_min(H); -inf: not computed, since the verdict did not need it
    sample_lower: float  # lower bound on lambda_min(H_n); -inf: not computed, since the verdict did not need it
    deviation: float  # upper bound on lambda_max(H_n - H); inf: not computed, since the verdict did not need it
    escape_direction: Tensor  # escape direction v, float64[d], a unit vector
    failure_probability: float  # probability that at least one of the bounds is wrong, as an upper bound
    examples: int  # n, number of examples in all batches
    batches: int  # B, number of batches over all workers
    hvp: str  # method of the Hessian-vector products
    hvp_reason: str | None  # error by which double backward failed; None: it did not fail, or was not tried
    backward_passes: int  # number of backward passes over all examples; a pass over a part counts as a fraction

    @property
    def headline(self) -> str:
        """The verdict as text. If epsilon is None, the text includes the bounds on lambda_min, the smallest Hessian
        eigenvalue, from which the verdict follows."""
        return headline_of(self.verdict, self.epsilon, self.lambda_min_lower, self.lambda_min_upper)

    def to_dict(self) -> dict[str, Any]:
        """Return a dict of plain types for JSON: the headline, and all fields except `escape_direction`. Non-finite
        floats become None."""
        values = {k: v for k, v in asdict(self).items() if k != "escape_direction"}
        return for_json(values | {"verdict": str(self.verdict), "headline": self.headline})

    def __str__(self) -> str:
        why = ""
        if self.verdict is Verdict.UNDECIDED and self.epsilon is not None:
            is_gradient = self.grad_norm_lower <= self.epsilon < self.grad_norm_upper
            value, limit = ("the gradient", "epsilon") if is_gradient else ("lambda_min", "the threshold")
            why = f": {value} may be on either side of {limit}"
        # List the bounds on ||g|| and on lambda_min(H), the measured v^T H v, rho, and the threshold.
        lower = f"[{self.lambda_min_lower:.3e}, {self.lambda_min_upper:.3e}]"
        below = f"lambda_min in {lower}: of the examples at least {self.sample_lower:.3e}, less {self.deviation:.1e}"
        if math.isinf(self.lambda_min_lower):
            below = f"lambda_min at most {self.lambda_min_upper:.3e}"
        given = "estimated along v" if self.hessian_lipschitz_estimated else "given"
        limit = "" if self.epsilon is None else f", epsilon {self.epsilon:.3e}"
        threshold = "" if self.threshold is None else f"threshold {self.threshold:.3e}, "
        return "\n".join(
            [
                f"of the population: {self.headline}{why}",
                f"  gradient norm in [{self.grad_norm_lower:.3e}, {self.grad_norm_upper:.3e}]{limit}",
                f"  {below}",
                f"  v^T H v = {self.quotient:.3e} (standard error {self.quotient_error:.1e}) over batches that v was "
                f"not found on",
                f"  {threshold}rho {self.hessian_lipschitz:.3e} ({given})",
                *([] if self.hvp_reason is None else [f"  by {self.hvp}; no double backward: {self.hvp_reason}"]),
                f"  from {self.examples:,} examples in {self.batches} batches, all with probability "
                f"{1 - self.failure_probability:g} if means of batches are near Gaussian and vary as measured",
            ]
        )


def certify_population(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    search: Search = Search(failure_probability=0.05),  # noqa: B008 -- immutable
    process_group: Any = None,
    progress: Callable[[int], None] = lambda products: None,
) -> PopulationCertificate:
    """Compute a certificate for the model's current parameters and the population from which the batches were drawn;
    collective.

    For the same number of examples, many small batches give tighter bounds than few large ones.

    Args:
        model, loss_fn, process_group: see `certify`.
        batches: see `certify`; each batch must also be an independent draw from the population.
        epsilon: threshold for the gradient norm. If it is None, there is no verdict on stationarity, but only on the
            sign of the smallest eigenvalue.
        hessian_lipschitz: rho, the Hessian's Lipschitz constant. By default it is measured along the direction found.
        search: only its fields `failure_probability` (of all bounds together, by default 0.05), `hvp`, `memory_limit`
            and `generator` are used.
        progress: called with the number of Hessian-vector products so far, at most about `MOST_PRODUCTS`. A product of
            the Hessian's variance over batches with a vector counts as three Hessian-vector products.

    Raises ValueError for invalid arguments, for fewer than eight batches, and for losses that vary between evaluations.

    >>> import torch
    >>> from packsaddle.curvature import certify_population
    >>> model = torch.nn.Linear(4, 1)
    >>> x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    >>> loss = lambda model, batch: (model(batch) - batch[:, :1]).square().mean()
    >>> str(certify_population(model, loss, x.split(8), epsilon=10.0).verdict)
    'second-order stationary'
    """
    from scipy.special import stdtrit  # imported here because it is slow to import

    check_positive(epsilon=epsilon, hessian_lipschitz=hessian_lipschitz)
    delta = search.failure_probability / _STATEMENTS
    batches = with_examples(batches)
    with certifying(model, process_group) as channel:
        curvature = Curvature(model, loss_fn, batches, channel)
        count = check_population(model, batches, process_group)
        chosen = choose_products(curvature, search.hvp)

        # Compute the gradient, and divide the batches into halves: every second batch serves to find a direction v, and
        # the remaining ones to measure v^T H v. Half of the workers start at the second batch, so that both halves have
        # about the same number of batches.
        gradient, spread = curvature.gradient()
        grad_norm = float(gradient.norm())
        off = spread * (1 + math.sqrt(2 * math.log(1 / delta)))
        least, most = max(0.0, grad_norm - off), grad_norm + off
        starts = ((channel.group.rank + half) % 2 for half in (0, 1))
        halves = [Curvature(model, loss_fn, every_nth(batches, 2, start), channel) for start in starts]

        def measure(products: Products) -> PopulationCertificate:
            seen, fresh = map(products.of, halves)
            lanczos = lanczos_over(seen, search)
            ritz = lanczos.run(_STEPS, lambda ritz: ritz.is_settling, progress)
            # Any vector v gives a valid upper bound on lambda_min(H), so the search may stop before v is an
            # eigenvector.
            v = lanczos.ritz_vector()
            products.copy_estimates(seen)
            fresh.copy_estimates(seen)
            off_by = max(fresh.checked(v)[1], ritz.rounding)
            rho = hessian_lipschitz or products.rho(v)
            threshold = threshold_of(epsilon, rho)
            limit = 0.0 if threshold is None else threshold
            quotient, error, degrees = _quotient(fresh, v)
            upper = quotient + float(stdtrit(degrees, 1 - delta)) * error + off_by

            # Compute a lower bound on lambda_min(H_n), and subtract an upper bound on lambda_max(H_n - H).
            sample_lower, deviation = -math.inf, math.inf
            if (epsilon is None or most <= epsilon) and upper >= limit:
                sample_lower = _lower_bound(products, delta, limit, search, progress)
                norm = _variance_norm(products, delta, search, progress)
                deviation = math.sqrt(2 * norm * math.log(curvature.d / delta))
            lower = sample_lower - deviation
            passes = sum(c.passes * c.examples for c in (curvature, *halves)) / curvature.examples
            return PopulationCertificate(
                verdict=judge(least, most, epsilon, rho, lower, upper),
                epsilon=epsilon,
                hessian_lipschitz=rho,
                hessian_lipschitz_estimated=hessian_lipschitz is None,
                threshold=threshold,
                grad_norm=grad_norm,
                grad_norm_lower=least,
                grad_norm_upper=most,
                quotient=quotient,
                quotient_error=error,
                lambda_min_upper=upper,
                lambda_min_lower=lower,
                sample_lower=sample_lower,
                deviation=deviation,
                escape_direction=v.cpu(),
                failure_probability=search.failure_probability,
                examples=curvature.examples,
                batches=count,
                hvp=products.name,
                hvp_reason=products.reason,
                backward_passes=math.ceil(passes),
            )

        return with_products(chosen, search.hvp, measure)


def check_population(model: nn.Module, batches: Iterable[Any], process_group: Any = None) -> int:
    """Return the number of batches over all workers, after a check that `certify_population` accepts the arguments;
    collective. Raises ValueError for fewer than eight batches."""
    mine = torch.tensor([sum(1 for _ in batches)], device=next(model.parameters()).device)
    resolve(process_group).all_reduce(mine)
    count = int(mine)
    if count < _FEWEST_BATCHES:
        raise ValueError(f"batches must be {_FEWEST_BATCHES} or more, on all workers together, got {count}")
    return count


def _quotient(products: Products, v: Tensor) -> tuple[float, float, int]:
    """Estimate the Rayleigh quotient v^T H v over the batches of `products`; collective.

    Returns the estimate, its standard error from the variation between batches, and the degrees of freedom of this
    error, i.e. the number of batches minus 1.
    """
    curvature = products.curvature
    # Sums over batches b of n_b q_b, n_b q_b^2 and 1, where q_b = v^T H_b v and n_b is the number of examples.
    sums = torch.zeros(3, dtype=torch.float64)
    for batch, n in curvature.read():
        q = float(v @ products.of_batch(batch, v))
        sums += torch.tensor([n * q, n * q * q, 1.0], dtype=torch.float64)
    curvature.passes += 2
    total, squares, count = curvature.sum(sums).tolist()
    mean, n = total / curvature.examples, curvature.examples
    within = max(0.0, squares - n * mean * mean) / (count - 1)
    return mean, math.sqrt(within / n), int(count) - 1


def _lower_bound(
    products: Products, delta: float, threshold: float, search: Search, progress: Callable[[int], None]
) -> float:
    """Return a lower bound on lambda_min, the smallest eigenvalue of the Hessian of the mean loss over the examples;
    collective.

    The bound fails with probability `delta`. It is computed by Lanczos steps. They end if the smallest Ritz value theta
    is below `threshold`, or if the bound is at least theta - 0.1 (theta - threshold), so that further steps could raise
    it only a little.
    """

    def is_enough(ritz: Ritz) -> bool:
        room = ritz.theta_min - threshold
        return room < 0 or ritz.theta_min - ritz.lower_bound(delta) <= 0.1 * room

    lanczos = lanczos_over(products, search)
    return lanczos.run(_STEPS, is_enough, lambda k: progress(_STEPS + k)).lower_bound(delta)


def _variance_norm(products: Products, delta: float, search: Search, progress: Callable[[int], None]) -> float:
    """Return an upper bound on the norm of the Hessian's variance over batches, which is E Z^2 in the module's
    docstring; collective. The bound fails with probability `delta`."""
    curvature = products.curvature
    count = curvature.batches()

    def variance(u: Tensor) -> Tensor:
        """Return the product of the Hessian's variance over batches with u, float64[d]. The result is a float64[d];
        collective.

        Batch b of the B batches has n_b examples and the Hessian H_b, and H_n is the Hessian of all n examples. The
        variance is sum_b n_b (H_b - H_n)^2 / ((B - 1) n). Since sum_b n_b (H_b - H_n) = 0, it equals sum_b n_b H_b (H_b
        - H_n) / ((B - 1) n). This second form is computed.
        """
        mean = products(u)
        total = torch.zeros_like(u)
        for batch, n in curvature.read():
            apart = products.of_batch(batch, u).sub_(mean)
            length = float(apart.norm())
            if length:
                total.add_(products.of_batch(batch, apart / length), alpha=n * length)
        curvature.passes += 4
        return curvature.sum(total).div_((count - 1) * curvature.examples)

    # Do Lanczos steps until the upper bound on the largest eigenvalue is at most 1.5 times the largest Ritz value.
    lanczos = lanczos_over(products, search, variance)
    ritz = lanczos.run(
        _VARIANCE_STEPS,
        lambda ritz: ritz.upper_bound(delta) <= _CLOSE * ritz.theta_max,
        lambda k: progress(2 * _STEPS + 3 * k),
    )
    return max(ritz.upper_bound(delta), 0.0)
