"""Is it a saddle? A certificate that a point is, or is not, an epsilon-second-order stationary point (Definition 2.4).

The verdict is never stronger than its evidence: a Rayleigh quotient below the threshold proves a saddle; the absence of
negative curvature is claimed with a failure probability (see `lanczos`); and otherwise it is undecided.
"""

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.certificate import Certificate, Verdict, judge
from packsaddle.channel import Channel
from packsaddle.curvature import Curvature, LossFn
from packsaddle.exchange import resolve
from packsaddle.lanczos import Lanczos, Ritz
from packsaddle.ledger import Ledger

_DOUBLINGS = 10
_ROUNDING = 16  # of a product, in units of the last place of ||H||: roughly what sums over batches and layers lose


def certify(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    epsilon: float,
    hessian_lipschitz: float | None = None,
    failure_probability: float = 1e-3,
    max_hvps: int = 200,
    tolerance: float = math.inf,
    sample_of: int | None = None,
    memory_limit: int = 4 * 2**30,
    generator: torch.Generator | None = None,
    process_group: Any = None,
) -> Certificate:
    """Certify the model's present parameters; collective, with each worker's own batches.

    Args:
        model: a network; put in eval mode meanwhile. Only trainable parameters count.
        loss_fn: loss_fn(model, batch) is the batch's mean loss, twice differentiable.
        batches: batches that can be read again and are the same every time.
        epsilon: the gradient's threshold; the curvature's is -sqrt(rho epsilon).
        hessian_lipschitz: rho; None measures ||H(x + h v) v - H(x - h v) v|| / (2 h) along the escape direction v.
        failure_probability: of the lower bound, over the random start.
        max_hvps: Hessian-vector products at most for the bounds; a verdict needs a few more (see `Certificate.hvps`).
        tolerance: go on after a saddle is found until ||H v - lambda v|| <= tolerance |lambda|, or `max_hvps` are done,
            for a better escape direction; by default the search stops with the verdict.
        sample_of: how many examples the batches of all workers were drawn from, if they are a sample; the gradient
            norm then comes with its standard error, from how batches differ.
        memory_limit: bytes of Lanczos vectors kept, of 8 d bytes each. Beyond, vectors are not kept, so that the
            bounds need a few more products, and the escape direction a second pass over those left out.
        generator: of the start, the same on every worker and fresh for every certificate; None draws a seed from
            the operating system on rank 0.

    Stops as soon as the verdict is settled. Raises ValueError for bad arguments and for losses that are not a
    function of the parameters.
    """
    begin = time.perf_counter()
    _check(epsilon, hessian_lipschitz, failure_probability, max_hvps, tolerance, sample_of, memory_limit)
    channel = Channel(resolve(process_group), Ledger())
    curvature = Curvature(model, loss_fn, batches, channel)
    gradient, error = curvature.gradient()
    search = _Search(
        curvature,
        Lanczos(
            curvature.hessian_vector,
            curvature.d,
            generator or _fresh_generator(channel, curvature.device),
            max_vectors=max(2, memory_limit // (8 * curvature.d)),
        ),
        float(gradient.norm()),
        epsilon,
        failure_probability,
        hessian_lipschitz,
    )
    search.run(max_hvps, tolerance)
    distance, lowest, bend = search.walk() if search.verdict is Verdict.SADDLE else (None, None, None)
    ritz, rho = search.ritz, search.rho
    return Certificate(
        verdict=search.verdict,
        epsilon=epsilon,
        loss=curvature.loss,
        grad_norm=search.grad_norm,
        grad_norm_error=None if sample_of is None else _finite_population(error, curvature.examples, sample_of),
        lambda_min_upper=search.upper,
        lambda_min_lower=search.lower,
        residual=search.residual,
        failure_probability=failure_probability,
        threshold=-math.sqrt(rho * epsilon),
        hessian_lipschitz=rho,
        hessian_lipschitz_estimated=hessian_lipschitz is None,
        escape_direction=search.v,
        slope=float(gradient @ search.v),
        escape_distance=distance,
        escape_loss=lowest,
        escape_bend=bend,
        ritz_values=ritz.thetas,
        ritz_shares=ritz.shares,
        examples=curvature.examples,
        sample_of=sample_of,
        precision=str(curvature.parameters[0].dtype).removeprefix("torch."),
        hvps=curvature.products,
        bytes_sent=channel.ledger.total.sent,
        seconds=time.perf_counter() - begin,
    )


@dataclass
class _Search:
    """The steps of the Lanczos process until the verdict is settled, and what is known by then."""

    curvature: Curvature
    lanczos: Lanczos
    grad_norm: float
    epsilon: float
    failure_probability: float
    given_rho: float | None

    def run(self, max_hvps: int, tolerance: float) -> None:
        """Do steps until the verdict is settled and v good enough, `max_hvps` are done, or there are no more."""
        measured, self.lower, settled = self.given_rho, -math.inf, False
        for k in range(1, max_hvps + 1):
            self.ritz = self.lanczos.step()
            self.rounding = _ROUNDING * self._eps() * max(map(abs, (self.ritz.theta_min, self.ritz.theta_max)))
            self.lower = max(self.lower, self.ritz.lower_bound(self.failure_probability) - self.rounding)
            last = k == max_hvps or self.lanczos.exhausted
            if measured is None and (last or self.grad_norm > self.epsilon or _settling(self.ritz)):
                measured = _measure_rho(self.curvature, self.lanczos.ritz_vector())
            if measured is not None:
                upper = self.ritz.theta_min + self.rounding
                verdict = self._verdict(measured, upper)
                wanting = verdict is Verdict.SADDLE and self.ritz.residual > tolerance * abs(self.ritz.theta_min)
                settled = verdict is not Verdict.UNDECIDED and not wanting
            if last or settled:
                break
        assert measured is not None
        self.rho = measured
        self._measure_direction()

    def _measure_direction(self) -> None:
        """v, its Rayleigh quotient and its residual: known from the recurrence if the basis is orthonormal, else
        measured, and then the verdict is what the measurement says."""
        self.v, quotient, self.residual = self.lanczos.ritz_vector(), self.ritz.theta_min, self.ritz.residual
        if not self.ritz.orthogonal:
            product = self.curvature.hessian_vector(self.v)
            quotient = float(self.v @ product)
            self.residual = float(product.sub_(self.v, alpha=quotient).norm())
        self.upper = quotient + self.rounding
        self.verdict = self._verdict(self.rho, self.upper)

    def walk(self) -> tuple[float, float, float]:
        """Follow v both ways with doubling steps while the loss falls on either side.

        Returns s and f(x + s v) with the lowest loss found, and the most that the mean of both sides fell, which a
        slope cannot do: with rho true, |lambda|^3 / (3 rho^2) at least, at any s from |lambda| / rho to twice that.
        """
        reach = max(1.0, math.sqrt(sum(float(p.detach().double().square().sum()) for p in self.curvature.parameters)))
        s = min(max(abs(self.upper) / (2 * self.rho), 1e-3 * reach), 1e-1 * reach)
        here = self.curvature.loss
        best, bend, last = (s, math.inf), -math.inf, (here, here)
        for _ in range(_DOUBLINGS):
            ahead, behind = (self.curvature.loss_at(self.v, sign * s) for sign in (1, -1))
            best = min(best, (s, ahead), (-s, behind), key=lambda pair: pair[1])
            bend = max(bend, here - (ahead + behind) / 2)
            if not (ahead < last[0] or behind < last[1]):
                break
            last, s = (ahead, behind), 2 * s
        return *best, bend

    def _eps(self) -> float:
        return float(torch.finfo(self.curvature.parameters[0].dtype).eps)

    def _verdict(self, rho: float, upper: float) -> Verdict:
        return judge(self.grad_norm, self.epsilon, -math.sqrt(rho * self.epsilon), upper, self.lower)


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


def _finite_population(error: float, examples: int, population: int) -> float:
    """The standard error of a mean of examples drawn without replacement."""
    return error * math.sqrt(max(0.0, 1 - examples / population))


def _fresh_generator(channel: Channel, device: torch.device) -> torch.Generator:
    """A generator seeded by the operating system on rank 0, the same on every worker."""
    seed = torch.tensor([torch.Generator().seed() & (2**31 - 1)], dtype=torch.int64, device=device)
    channel.broadcast(seed, "certificate")
    return torch.Generator(device).manual_seed(int(seed))


def _check(
    epsilon: float,
    rho: float | None,
    failure_probability: float,
    max_hvps: int,
    tolerance: float,
    sample_of: int | None,
    memory_limit: int,
) -> None:
    if not 0 < epsilon < math.inf:
        raise ValueError(f"epsilon must be positive and finite, got {epsilon}")
    if rho is not None and not 0 < rho < math.inf:
        raise ValueError(f"hessian_lipschitz must be positive and finite, got {rho}")
    if not 0 < failure_probability < 1:
        raise ValueError(f"failure_probability must be in (0, 1), got {failure_probability}")
    if max_hvps < 1:
        raise ValueError(f"max_hvps must be at least 1, got {max_hvps}")
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
    if sample_of is not None and sample_of < 1:
        raise ValueError(f"sample_of must be at least 1 example, got {sample_of}")
    if memory_limit < 0:
        raise ValueError(f"memory_limit must not be negative, got {memory_limit} bytes")
