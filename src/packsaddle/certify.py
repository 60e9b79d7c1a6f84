"""Is it a saddle? A certificate that a point is, or is not, an epsilon-second-order stationary point (Definition 2.4).

The verdict is never stronger than its evidence: a Rayleigh quotient below the threshold proves a saddle; the absence of
negative curvature is claimed with a failure probability (see `lanczos`); and otherwise it is undecided.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.channel import Channel
from packsaddle.curvature import Curvature, LossFn
from packsaddle.exchange import resolve
from packsaddle.lanczos import Ritz, lanczos
from packsaddle.ledger import Ledger


class Verdict(StrEnum):
    """What a certificate says."""

    SECOND_ORDER_STATIONARY = "second-order stationary"
    SADDLE = "saddle"
    GRADIENT_TOO_LARGE = "gradient too large"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Certificate:
    """The evidence at one point; the Hessian is that of the mean loss over `examples` examples, in eval mode."""

    verdict: Verdict
    epsilon: float
    loss: float
    grad_norm: float
    lambda_min_upper: float  # lambda_min is at most this: a Ritz value
    lambda_min_lower: float  # and at least this, but for the failure probability; -inf: nothing known
    residual: float  # ||H v - lambda v|| for the escape direction v
    failure_probability: float
    threshold: float  # -sqrt(rho epsilon)
    hessian_lipschitz: float  # rho
    hessian_lipschitz_estimated: bool  # rho was measured along v, not given: an estimate from below
    escape_direction: Tensor  # unit v, float64[d], of curvature lambda_min_upper
    examples: int
    precision: str  # of the products; recurrences are in double precision
    hvps: int
    bytes_sent: int  # by this worker
    seconds: float

    @property
    def smallest_epsilon(self) -> float:
        """The smallest epsilon for which this point would be certified with this rho (inf if nothing bounds it)."""
        return max(self.grad_norm, max(0.0, -self.lambda_min_lower) ** 2 / self.hessian_lipschitz)

    def __str__(self) -> str:
        rho = "estimated along v" if self.hessian_lipschitz_estimated else "given"
        return (
            f"{self.verdict}\n"
            f"  gradient norm {self.grad_norm:.3e}, epsilon {self.epsilon:.3e}\n"
            f"  lambda_min in [{self.lambda_min_lower:.3e}, {self.lambda_min_upper:.3e}], from below with probability "
            f"{1 - self.failure_probability:g}, residual {self.residual:.1e}\n"
            f"  threshold -sqrt(rho epsilon) = {self.threshold:.3e}, rho {self.hessian_lipschitz:.3e} ({rho})\n"
            f"  Hessian of the mean loss {self.loss:.5f} over {self.examples:,} examples, products in "
            f"{self.precision}; {self.hvps} products, {self.seconds:.1f} s"
        )


def certify(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    epsilon: float,
    hessian_lipschitz: float | None = None,
    failure_probability: float = 1e-3,
    max_hvps: int = 200,
    generator: torch.Generator | None = None,
    process_group: Any = None,
) -> Certificate:
    """Certify the model's present parameters; collective, with each worker's own batches.

    Args:
        model: a network; put in eval mode meanwhile. Only trainable parameters count.
        loss_fn: loss_fn(model, batch) is the batch's mean loss, twice differentiable.
        batches: batches that can be read again and are the same every time.
        epsilon: the gradient's threshold; the curvature's is -sqrt(rho epsilon).
        hessian_lipschitz: rho; None measures ||H(x + h v) v - H(x) v|| / h along the escape direction v.
        failure_probability: of the lower bound, over the random start.
        max_hvps: Hessian-vector products at most, those for rho not counted. Each costs one vector of d doubles.
        generator: of the start, the same on every worker and fresh for every certificate; None draws a seed from
            the operating system on rank 0.

    Stops as soon as the verdict is settled. Raises ValueError for bad arguments and for losses that are not a
    function of the parameters.
    """
    begin = time.perf_counter()
    _check(epsilon, hessian_lipschitz, failure_probability, max_hvps)
    channel = Channel(resolve(process_group), Ledger())
    curvature = Curvature(model, loss_fn, batches, channel)
    grad_norm = float(curvature.gradient().norm())
    rho, ritz, lower = hessian_lipschitz, None, -math.inf
    for ritz in lanczos(
        curvature.hessian_vector, curvature.d, generator or _fresh_generator(channel, curvature.device)
    ):
        lower = max(lower, ritz.lower_bound(failure_probability))
        last = ritz.exhausted or ritz.steps >= max_hvps
        if rho is None and (last or grad_norm > epsilon or _settling(ritz)):
            rho = _measure_rho(curvature, ritz.vector())
        if last or (rho is not None and _verdict(grad_norm, epsilon, rho, ritz, lower) is not Verdict.UNDECIDED):
            break
    assert ritz is not None
    assert rho is not None
    return Certificate(
        verdict=_verdict(grad_norm, epsilon, rho, ritz, lower),
        epsilon=epsilon,
        loss=curvature.loss,
        grad_norm=grad_norm,
        lambda_min_upper=ritz.theta_min,
        lambda_min_lower=lower,
        residual=ritz.residual,
        failure_probability=failure_probability,
        threshold=-math.sqrt(rho * epsilon),
        hessian_lipschitz=rho,
        hessian_lipschitz_estimated=hessian_lipschitz is None,
        escape_direction=ritz.vector(),
        examples=curvature.examples,
        precision=str(curvature.parameters[0].dtype).removeprefix("torch."),
        hvps=ritz.steps + (2 if hessian_lipschitz is None else 0),
        bytes_sent=channel.ledger.total.sent,
        seconds=time.perf_counter() - begin,
    )


def _verdict(grad_norm: float, epsilon: float, rho: float, ritz: Ritz, lower: float) -> Verdict:
    """A Ritz value below the threshold is proof of a saddle, whatever its residual: it is a Rayleigh quotient."""
    threshold = -math.sqrt(rho * epsilon)
    if not grad_norm <= epsilon:
        return Verdict.GRADIENT_TOO_LARGE
    if ritz.theta_min < threshold:
        return Verdict.SADDLE
    return Verdict.SECOND_ORDER_STATIONARY if lower >= threshold else Verdict.UNDECIDED


def _settling(ritz: Ritz) -> bool:
    """Whether v is good enough to measure rho along: a residual of a tenth of the curvature."""
    return ritz.residual <= 0.1 * abs(ritz.theta_min)


def _measure_rho(curvature: Curvature, v: Tensor) -> float:
    """||H(x + h v) v - H(x - h v) v|| / (2 h): what the Hessian changes by along v, so no more than rho."""
    h = 1e-2
    with curvature.moved(v, h):
        ahead = curvature.hessian_vector(v)
    with curvature.moved(v, -h):
        behind = curvature.hessian_vector(v)
    return max(float((ahead - behind).norm()) / (2 * h), torch.finfo(torch.float64).tiny)


def _fresh_generator(channel: Channel, device: torch.device) -> torch.Generator:
    """A generator seeded by the operating system on rank 0, the same on every worker."""
    seed = torch.tensor([torch.Generator().seed() & (2**31 - 1)], dtype=torch.int64, device=device)
    channel.broadcast(seed, "certificate")
    return torch.Generator(device).manual_seed(int(seed))


def _check(epsilon: float, rho: float | None, failure_probability: float, max_hvps: int) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if rho is not None and not 0 < rho < math.inf:
        raise ValueError(f"hessian_lipschitz must be positive and finite, got {rho}")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability}")
    if max_hvps < 1:
        raise ValueError(f"max_hvps must be at least 1, got {max_hvps}")
