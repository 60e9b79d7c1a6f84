"""Is it a saddle? A certificate that a point is, or is not, an epsilon-second-order stationary point (Definition 2.4).

The verdict is never stronger than its evidence: a Rayleigh quotient below the threshold proves a saddle; the absence of
negative curvature is claimed with a failure probability (see `lanczos`); and otherwise it is undecided.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature.certificate import Certificate, Verdict, judge, proposed_epsilon
from packsaddle.curvature.hessian import Curvature, LossFn, rank_0_buffers
from packsaddle.curvature.lanczos import Lanczos, Ritz, check_probability
from packsaddle.curvature.products import Differences, Hvp, Products, choose_products, lanczos_over
from packsaddle.curvature.sharded import derivatives

_LONGEST_WALK = 12


def certify(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    failure_probability: float = 1e-3,
    max_hvps: int = 200,
    tolerance: float = math.inf,
    sample_of: int | None = None,
    lr: float | None = None,
    hvp: Hvp = "auto",
    memory_limit: int = 4 * 2**30,
    generator: torch.Generator | None = None,
    process_group: Any = None,
    progress: Callable[[int], None] = lambda products: None,
) -> Certificate:
    """Certify the model's present parameters; collective, with each worker's own batches.

    Args:
        model: a network; put in eval mode meanwhile. Only trainable parameters count. Where FSDP2 has sharded it over
            the workers, every vector is sharded too.
        loss_fn: loss_fn(model, batch) is the batch's mean loss.
        batches: batches that can be read again and are the same every time.
        epsilon: the gradient's threshold; the curvature's is -sqrt(rho epsilon). None takes the least that the gradient
            passes (`curvature.certificate.proposed_epsilon`), for a verdict on the curvature; state one to compare
            points.
        hessian_lipschitz: rho; None measures ||H(x + h v) v - H(x - h v) v|| / (2 h) along the escape direction v.
        failure_probability: of the lower bound on lambda_min over the random start, and of the upper on lambda_max.
        max_hvps: Hessian-vector products at most for the bounds; a verdict needs a few more (see `Certificate.hvps`).
        tolerance: go on after a saddle is found until ||H v - lambda v|| <= tolerance |lambda|, or `max_hvps` are done,
            for a better escape direction; by default the search stops with the verdict.
        sample_of: how many examples the batches of all workers were drawn from; if those are more, the gradient
            norm then comes with its standard error, from how batches differ.
        lr: the step size of SGD that may go on from here, for `Certificate.escape_steps`; over 1 - momentum.
        hvp: how Hessian-vector products are taken: by "double-backward"; by central "differences" of gradients, whose
            measured error is taken off both bounds; "auto" tries double backward on a batch of every worker, and takes
            differences where torch has none (fused attention, compiled networks), saying so in the certificate.
        memory_limit: bytes of Lanczos vectors kept, of 8 d bytes each. Beyond, vectors are not kept, so that the
            bounds need a few more products, and the escape direction a second pass over those left out.
        generator: of the start, which is rank 0's; fresh for every certificate. None takes a seed from the operating
            system.
        progress: called with the number of the search's products so far, of `max_hvps` at most.

    Stops as soon as the verdict is settled. Raises ValueError for bad arguments and for losses that are not a
    function of the parameters.
    """
    begin = time.perf_counter()
    _check(epsilon, hessian_lipschitz, failure_probability, max_hvps, tolerance, sample_of, memory_limit)
    if lr is not None and not 0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    channel = Communicator(resolve(process_group), Ledger())
    with rank_0_buffers(model, channel):
        curvature = derivatives(model, loss_fn, batches, channel)
        if sample_of is not None and sample_of < curvature.examples:
            raise ValueError(f"sample_of must be at least the {curvature.examples} examples given, got {sample_of}")
        if sample_of == curvature.examples:
            sample_of = None
        products = choose_products(curvature, hvp)
        gradient, error = curvature.gradient()
        grad_norm = curvature.norm(gradient)
        grad_norm_error = None if sample_of is None else _finite_population(error, curvature.examples, sample_of)
        precision = torch.finfo(curvature.parameters[0].dtype).eps
        given, epsilon = epsilon, epsilon or proposed_epsilon(grad_norm, grad_norm_error, precision)
        search = _Search(
            products,
            lanczos_over(products, generator, memory_limit),
            grad_norm,
            epsilon,
            failure_probability,
            hessian_lipschitz,
        )
        search.run(max_hvps, tolerance, progress)
        distance, lowest, bend = search.walk() if search.verdict is Verdict.SADDLE else (None, None, None)
    ritz, rho = search.ritz, search.rho
    return Certificate(
        verdict=search.verdict,
        epsilon=epsilon,
        epsilon_proposed=given is None,
        loss=curvature.loss,
        grad_norm=search.grad_norm,
        grad_norm_error=grad_norm_error,
        lambda_min_upper=search.upper,
        lambda_min_lower=search.lower,
        lambda_max_lower=ritz.theta_max - ritz.rounding,
        lambda_max_upper=ritz.upper_bound(failure_probability),
        residual=search.residual,
        failure_probability=failure_probability,
        threshold=-math.sqrt(rho * epsilon),
        hessian_lipschitz=rho,
        hessian_lipschitz_estimated=hessian_lipschitz is None,
        escape_direction=search.v.cpu(),
        slope=curvature.dot(gradient, search.v),
        escape_distance=distance,
        escape_loss=lowest,
        escape_bend=bend,
        ritz_values=ritz.thetas,
        ritz_shares=ritz.shares,
        examples=curvature.examples,
        sample_of=sample_of,
        precision=str(curvature.parameters[0].dtype).removeprefix("torch."),
        hvp=products.name,
        hvp_reason=products.reason,
        hvp_error=ritz.rounding,
        hvp_step=products.step if isinstance(products, Differences) else None,
        hvps=curvature.products,
        backward_passes=curvature.passes,
        bytes_sent=channel.ledger.total.sent,
        seconds=time.perf_counter() - begin,
        lr=lr,
    )


@dataclass
class _Search:
    """The steps of the Lanczos process until the verdict is settled; after `run`, what is known by then."""

    products: Products
    lanczos: Lanczos
    grad_norm: float
    epsilon: float
    failure_probability: float
    given_rho: float | None
    rho: float = 0.0
    lower: float = -math.inf
    ritz: Ritz = field(init=False)
    v: Tensor = field(init=False)
    upper: float = field(init=False)
    residual: float = field(init=False)
    verdict: Verdict = field(init=False)

    def run(self, max_hvps: int, tolerance: float, progress: Callable[[int], None]) -> None:
        """Do steps until the verdict is settled and v good enough, `max_hvps` are done, or there are no more."""
        measured_at, self.rho = 0, self.given_rho or 0.0
        for k in range(1, max_hvps + 1):
            self.ritz = self.lanczos.step()
            progress(k)
            self.lower = self.ritz.lower_bound(self.failure_probability)  # never below an earlier one but by its error
            last = k == max_hvps or self.lanczos.exhausted
            if self.given_rho is None and not measured_at:
                if not (last or self.grad_norm > self.epsilon or _settling(self.ritz)):
                    continue
                self.rho, measured_at = self._measure_rho(), k
            if not (last or self._settled(tolerance)):
                continue
            if self.given_rho is None and measured_at < k:  # rho is that of the final v at least
                self.rho = max(self.rho, self._measure_rho())
                measured_at = k
            if last or self._settled(tolerance):
                self._measure_direction()
                if last or self.verdict is not Verdict.UNDECIDED or not self.ritz.orthogonal:
                    break

    def _settled(self, tolerance: float) -> bool:
        verdict = self._verdict(self.ritz.theta_min + self.ritz.rounding)
        if verdict is Verdict.SADDLE and self.ritz.residual > tolerance * abs(self.ritz.theta_min):
            return False
        return verdict is not Verdict.UNDECIDED

    def _measure_rho(self) -> float:
        return max(self.products.change(self.lanczos.ritz_vector()), torch.finfo(torch.float64).tiny)

    def _measure_direction(self) -> None:
        """v, its Rayleigh quotient and its residual: known from the recurrence if the basis is orthonormal and products
        are exact, else measured, and then the verdict is what the measurement says."""
        self.v, quotient, self.residual = self.lanczos.ritz_vector(), self.ritz.theta_min, self.ritz.residual
        if not self.ritz.orthogonal or self.products.error:
            product, error = self.products.checked(self.v)
            if error > self.ritz.rounding:
                self.ritz = replace(self.ritz, rounding=error)
                self.lower = self.ritz.lower_bound(self.failure_probability)
            quotient = self.curvature.dot(self.v, product)
            self.residual = self.curvature.norm(product.sub_(self.v, alpha=quotient))
        self.upper = quotient + self.ritz.rounding
        self.verdict = self._verdict(self.upper)

    @property
    def curvature(self) -> Curvature:
        """The derivatives that products come from."""
        return self.products.curvature

    def walk(self) -> tuple[float, float, float]:
        """Follow v both ways, from ||x|| / 1000 or less, each step four times the last, while the loss falls on a side.

        Returns s and f(x + s v) with the lowest loss found, and the most that the mean of both sides fell, which a
        slope cannot do: with rho true, |lambda|^3 / (10 rho^2) at least, at any s from |lambda| / (2 rho) to four times
        that.
        """
        reach = max(1.0, self.curvature.size_of_parameters())
        s = min(abs(self.upper) / (2 * self.rho), 1e-3 * reach)
        here = self.curvature.loss
        best, bend, last = (s, math.inf), -math.inf, (here, here)
        for _ in range(_LONGEST_WALK):
            ahead, behind = (self.curvature.loss_at(self.v, sign * s) for sign in (1, -1))
            best = min(best, (s, ahead), (-s, behind), key=lambda pair: pair[1])
            bend = max(bend, here - (ahead + behind) / 2)
            # Shorter steps may rise by rounding alone.
            if s >= 1e-2 * reach and not (ahead < last[0] or behind < last[1]):
                break
            last, s = (ahead, behind), 4 * s
        return *best, bend

    def _verdict(self, upper: float) -> Verdict:
        return judge(self.grad_norm, self.epsilon, -math.sqrt(self.rho * self.epsilon), upper, self.lower)


def _settling(ritz: Ritz) -> bool:
    """Tell if v is good enough to measure rho along: a residual of a tenth of the curvature."""
    return ritz.residual <= 0.1 * abs(ritz.theta_min)


def _finite_population(error: float, examples: int, population: int) -> float:
    """The standard error of a mean of examples drawn without replacement."""
    return error * math.sqrt(max(0.0, 1 - examples / population))


def _check(
    epsilon: float | None,
    rho: float | None,
    failure_probability: float,
    max_hvps: int,
    tolerance: float,
    sample_of: int | None,
    memory_limit: int,
) -> None:
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if rho is not None and not 0 < rho < math.inf:
        raise ValueError(f"hessian_lipschitz must be positive and finite, got {rho}")
    check_probability(failure_probability)
    if max_hvps < 1:
        raise ValueError(f"max_hvps must be at least 1, got {max_hvps}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if sample_of is not None and sample_of < 1:
        raise ValueError(f"sample_of must be at least 1 example, got {sample_of}")
    if memory_limit < 0:
        raise ValueError(f"memory_limit must not be negative, got {memory_limit} bytes")
