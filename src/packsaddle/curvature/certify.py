"""Is it a saddle? A certificate that a point is, or is not, an epsilon-second-order stationary point (Definition 2.4).

The verdict is never stronger than its evidence: a Rayleigh quotient below the threshold proves a saddle; the absence of
negative curvature is claimed with a failure probability (see `lanczos`); and otherwise it is undecided.
"""

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature.certificate import Certificate, Verdict, proposed_epsilon
from packsaddle.curvature.hessian import LossFn, WithExamples, rank_0_buffers
from packsaddle.curvature.lanczos import check_probability
from packsaddle.curvature.products import Differences, Hvp, Products, choose_products, with_products
from packsaddle.curvature.search import Bounds, Goal, Search, pilot
from packsaddle.curvature.sharded import derivatives, is_sharded


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
    sharpness: float = math.inf,
    pilot_examples: int = 2048,
    sample_of: int | None = None,
    lr: float | None = None,
    hvp: Hvp = "auto",
    memory_limit: int = 4 * 2**30,
    generator: torch.Generator | None = None,
    process_group: Any = None,
    tensor_parallel: Any = None,
    progress: Callable[[Bounds], None] = lambda bounds: None,
) -> Certificate:
    """Certify the model's present parameters; collective, with each worker's own batches.

    Args:
        model: a network; put in eval mode meanwhile. Only trainable parameters count. Where FSDP2 or tensor
            parallelism has sharded it over the workers, every vector is sharded too.
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
        sharpness: go on until the bounds on lambda_max are apart by at most this share of it, or `max_hvps` are done.
        pilot_examples: where there are eight times as many examples or more, look for a saddle's direction on about
            this many first, and prove it by one product over all (`curvature.search`); 0 goes without, and so does a
            finite `tolerance` or `sharpness`. Such a certificate bounds no eigenvalue from the other side.
        sample_of: how many examples the batches of all workers were drawn from; if those are more, the gradient
            norm then comes with its standard error, from how batches differ.
        lr: the step size of SGD that may go on from here, for `Certificate.escape_steps`; over 1 - momentum.
        hvp: how Hessian-vector products are taken: by "double-backward"; by central "differences" of gradients, whose
            measured error is taken off both bounds; "auto" tries double backward on a batch of every worker, and takes
            differences where torch has none (fused attention, compiled networks), or where it is wrong (a custom
            `autograd.Function`, see docs/certificates.md), saying so in the certificate.
        memory_limit: bytes of Lanczos vectors kept, of 8 d bytes each. Beyond, vectors are not kept, so that the
            bounds need a few more products, and the escape direction a second pass over those left out.
        generator: of the start, which is rank 0's; fresh for every certificate. None takes a seed from the operating
            system.
        process_group: the workers; None for the default group, or this process alone.
        tensor_parallel: the DeviceMesh of the workers that tensor parallelism gives the same batches, if any.
        progress: called after each of the search's products with the bounds then (`curvature.search.Bounds`).

    Stops as soon as the verdict is settled. Raises ValueError for bad arguments, for losses that are not a function of
    the parameters, and for "double-backward" where it is wrong.
    """
    begin = time.perf_counter()
    _check(epsilon, hessian_lipschitz, failure_probability, max_hvps, tolerance, sharpness, sample_of, memory_limit)
    if lr is not None and not 0 <= lr < math.inf:
        raise ValueError(f"lr must be finite and not negative, got {lr}")
    if pilot_examples < 0:
        raise ValueError(f"pilot_examples must not be negative, got {pilot_examples}")
    channel = Communicator(resolve(process_group), Ledger())
    if not is_sharded(model):  # whose workers go through as many batches together
        batches = WithExamples(batches)
    # A DataLoader draws from torch's generator each time that it is read.
    with torch.random.fork_rng(devices=()), rank_0_buffers(model, channel):
        # The point: its loss, its gradient, and how products are taken.
        of = partial(derivatives, model, loss_fn, channel=channel, tensor_parallel=tensor_parallel)
        curvature = of(batches)
        if sample_of is not None and sample_of < curvature.examples:
            raise ValueError(f"sample_of must be at least the {curvature.examples} examples given, got {sample_of}")
        if sample_of == curvature.examples:
            sample_of = None
        chosen = choose_products(curvature, hvp)  # before a gradient, with which a compiled model would fix its graph
        gradient, error = curvature.gradient()
        grad_norm = curvature.norm(gradient)
        grad_norm_error = None if sample_of is None else _finite_population(error, curvature.examples, sample_of)
        precision = torch.finfo(curvature.parameters[0].dtype).eps
        given, epsilon = epsilon, epsilon or proposed_epsilon(grad_norm, grad_norm_error, precision)
        goal = Goal(grad_norm, epsilon, hessian_lipschitz, failure_probability, max_hvps, tolerance, sharpness)

        def decide(products: Products) -> tuple[Search, Search | None, tuple[float, float, float] | None]:
            """A direction found on a part of the examples, and proved on all; or the search on all."""
            search, scout = Search(products, goal, progress), None
            if grad_norm <= epsilon and math.isinf(tolerance) and math.isinf(sharpness):
                scout = pilot(products, goal, pilot_examples, batches, of, generator, memory_limit, progress)
            if scout is None or not search.proves(scout.v, scout.error):
                scout = None
                search.run(generator, memory_limit)
            return search, scout, search.walk(scout) if search.verdict is Verdict.SADDLE else None

        search, scout, walk = with_products(chosen, hvp, decide)
        products, sharpest = search.products, (scout or search).sharpest
    distance, lowest, bend = walk or (None, None, None)
    ritz = (scout or search).ritz
    assert ritz is not None
    return Certificate(
        verdict=search.verdict,
        epsilon=epsilon,
        epsilon_proposed=given is None,
        loss=curvature.loss,
        grad_norm=grad_norm,
        grad_norm_error=grad_norm_error,
        lambda_min_upper=search.upper,
        lambda_min_lower=search.lower,
        lambda_max_lower=search.lambda_max[0],
        lambda_max_upper=search.lambda_max[1],
        residual=search.residual,
        failure_probability=failure_probability,
        threshold=-math.sqrt(search.rho * epsilon),
        hessian_lipschitz=search.rho,
        hessian_lipschitz_estimated=hessian_lipschitz is None,
        escape_direction=search.v.cpu(),
        sharpest_direction=None if sharpest is None else sharpest.cpu(),
        slope=curvature.dot(gradient, search.v),
        escape_distance=distance,
        escape_loss=lowest,
        escape_bend=bend,
        ritz_values=ritz.thetas,
        ritz_shares=ritz.shares,
        examples=curvature.examples,
        sample_of=sample_of,
        pilot_examples=None if scout is None else scout.curvature.examples,
        pilot_hvps=0 if scout is None else scout.curvature.products,
        precision=str(curvature.parameters[0].dtype).removeprefix("torch."),
        hvp=products.name,
        hvp_reason=products.reason,
        hvp_error=search.error,
        hvp_step=products.step if isinstance(products, Differences) else None,
        hvps=curvature.products,
        backward_passes=math.ceil(curvature.passes),
        bytes_sent=channel.ledger.total.sent,
        seconds=time.perf_counter() - begin,
        lr=lr,
    )


def _finite_population(error: float, examples: int, population: int) -> float:
    """The standard error of a mean of examples drawn without replacement."""
    return error * math.sqrt(max(0.0, 1 - examples / population))


def _check(
    epsilon: float | None,
    rho: float | None,
    failure_probability: float,
    max_hvps: int,
    tolerance: float,
    sharpness: float,
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
    for name, share in (("tolerance", tolerance), ("sharpness", sharpness)):
        if not share > 0:
            raise ValueError(f"{name} must be positive, got {share}")
    if sample_of is not None and sample_of < 1:
        raise ValueError(f"sample_of must be at least 1 example, got {sample_of}")
    if memory_limit < 0:
        raise ValueError(f"memory_limit must not be negative, got {memory_limit} bytes")
