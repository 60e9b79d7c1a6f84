"""Certificates that a point is, or is not, an epsilon-second-order stationary point (Definition 2.4 of the paper).

The verdict is never stronger than its evidence:

- A Rayleigh quotient of the Hessian below the threshold -sqrt(rho epsilon) proves a saddle.
- The absence of eigenvalues below the threshold is claimed with a failure probability (see `lanczos`).
- If the evidence suffices for neither, the verdict is "undecided".

If no epsilon is given, there is no verdict on stationarity. A negative Rayleigh quotient then proves that the point is
not a minimum.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from packsaddle.curvature.certificate import Certificate, threshold_of
from packsaddle.curvature.hessian import Curvature, LossFn, certifying
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Differences, Products, choose_products, with_products
from packsaddle.curvature.search import Bounds, CurvatureSearch
from packsaddle.errors import check_positive


def certify(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    search: Search = Search(),  # noqa: B008 -- immutable
    sample_of: int | None = None,
    process_group: Any = None,
    progress: Callable[[Bounds], None] = lambda bounds: None,
) -> Certificate:
    """Compute a certificate for the model's current parameters; collective. The loss is the mean over the batches of
    all workers.

    Args:
        model: a network, evaluated in eval mode. Only trainable parameters count. They must not be DTensors: load the
            full state dict of a sharded model into an unsharded one.
        loss_fn: loss_fn(model, batch) is the batch's mean loss.
        batches: a list, or another iterable that yields the same batches every time.
        epsilon: threshold for the gradient norm; the threshold for the smallest eigenvalue is -sqrt(rho epsilon). If
            epsilon is None, there is no verdict on stationarity, but only on the sign of the smallest eigenvalue. The
            search then continues until the residual of the escape direction v (the approximate eigenvector of that
            eigenvalue) is at most a tenth of the eigenvalue's magnitude. Set epsilon to compare points.
        hessian_lipschitz: rho, the Lipschitz constant of the Hessian. By default it is measured along v as
            ||H(x + h v) v - H(x - h v) v|| / (2 h).
        search: the limits and tolerances of the search, and the method of its Hessian-vector products.
        sample_of: size of the data set from which the batches of all workers were drawn. If it exceeds the number of
            examples in these batches, the certificate has a standard error of the gradient, from the variation between
            batches.
        process_group: the group of the workers; by default torch's default group, or this process alone.
        progress: called with the current bounds (`curvature.search.Bounds`) after each Hessian-vector product of the
            search.

    The search stops once the verdict is decided, unless `search` sets a `tolerance` that needs more products.

    Raises ValueError for invalid arguments, and for losses that vary between evaluations (augmentation, shuffling).
    Raises NotFiniteError if the loss or a derivative is not finite. With hvp="double-backward", raises
    DoubleBackwardError if products by double backward are wrong.
    """
    begin = time.perf_counter()
    check_positive(epsilon=epsilon, hessian_lipschitz=hessian_lipschitz)
    if sample_of is not None and sample_of < 1:
        raise ValueError(f"sample_of must be at least 1 example, got {sample_of}")
    with certifying(model, process_group) as channel:
        # Evaluate the loss and its gradient at the current parameters, and choose the method of Hessian-vector
        # products.
        curvature = Curvature(model, loss_fn, batches, channel)
        if sample_of is not None and sample_of < curvature.examples:
            raise ValueError(f"sample_of must be at least the {curvature.examples} examples given, got {sample_of}")
        if sample_of == curvature.examples:
            sample_of = None
        # Choose the method before the first gradient, since a compiled model fixes its backward graph at its first
        # backward pass.
        chosen = choose_products(curvature, search.hvp)
        gradient, error = curvature.gradient()
        grad_norm = float(gradient.norm())
        grad_norm_error = None
        if sample_of is not None:  # correct the standard error, since the examples were drawn without replacement
            grad_norm_error = error * math.sqrt(max(0.0, 1 - curvature.examples / sample_of))

        # Decide if the smallest eigenvalue, lambda_min, is below its threshold: -sqrt(rho epsilon), or 0 if no epsilon
        # is given.
        def searched(products: Products) -> CurvatureSearch:
            found = CurvatureSearch(products, grad_norm, epsilon, hessian_lipschitz, search, progress)
            found.run()
            return found

        found = with_products(chosen, search.hvp, searched)
        walk = found.walk() if found.verdict.rests_on_negative_curvature else None
        products, ritz, sharpest = found.products, found.ritz, found.sharpest
    distance, lowest, bend = walk or (None, None, None)
    return Certificate(
        verdict=found.verdict,
        epsilon=epsilon,
        loss=curvature.loss,
        grad_norm=grad_norm,
        grad_norm_error=grad_norm_error,
        lambda_min_upper=found.upper,
        lambda_min_lower=found.lower,
        lambda_max_lower=found.lambda_max[0],
        lambda_max_upper=found.lambda_max[1],
        residual=found.residual,
        failure_probability=search.failure_probability,
        threshold=threshold_of(epsilon, found.rho),
        hessian_lipschitz=found.rho,
        hessian_lipschitz_estimated=hessian_lipschitz is None,
        escape_direction=found.v.cpu(),
        sharpest_direction=None if sharpest is None else sharpest.cpu(),
        slope=float(gradient @ found.v),
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
    )
