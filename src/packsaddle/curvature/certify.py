"""Certificates that a point is, or is not, an epsilon-second-order stationary point (Definition 2.4 of the paper).

The verdict is never stronger than its evidence:

- A Rayleigh quotient of the Hessian below the threshold -sqrt(rho epsilon) proves a saddle.
- The absence of eigenvalues below the threshold is claimed with a failure probability (see `lanczos`).
- If the evidence suffices for neither, the verdict is "undecided".

If no epsilon is given, there is no verdict on stationarity. A negative Rayleigh quotient then proves that the point is
not a minimum.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.curvature.certificate import Certificate, Verdict, threshold_of
from packsaddle.curvature.differences import Differences
from packsaddle.curvature.double_backward import choose_products, with_products
from packsaddle.curvature.mean_loss import LossFn, certifying
from packsaddle.curvature.options import Search
from packsaddle.curvature.products import Products
from packsaddle.curvature.progress import Progress, Reporter, shown
from packsaddle.curvature.search import CurvatureSearch, Decision, Losses, size_of_sample
from packsaddle.curvature.sharded import mean_loss_of
from packsaddle.errors import check_positive

# About the time of a saddle's search and proof, in that of two losses and a gradient.
_TIME_OF_A_PROOF = 10


def certify(
    model: nn.Module | Tensor,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[Any] | None = None,
    *,
    epsilon: float | None = None,
    hessian_lipschitz: float | None = None,
    search: Search = Search(),  # noqa: B008 -- immutable
    sample_of: int | None = None,
    process_group: Any = None,
    tensor_parallel: Any = None,
    progress: bool | Callable[[Progress], None] = True,
) -> Certificate:
    """Compute a certificate for the model's current parameters; collective. The loss is the mean over the batches of
    all workers.

    Args:
        model: a network, evaluated in eval mode. Only trainable parameters count. They may be sharded by FSDP2 or
            tensor parallelism; each process then gets its part of the directions. Or a point: a tensor x, of any shape.
        loss_fn: loss_fn(model, batch) is the batch's mean loss. For a point, loss_fn(x) is the function's value.
        batches: a list, or another iterable that yields the same batches every time. None for a point.
        epsilon: threshold for the gradient norm; the threshold for the smallest eigenvalue is -sqrt(rho epsilon). If
            epsilon is None, there is no verdict on stationarity, but only on the sign of the smallest eigenvalue. The
            search then continues until the residual of the escape direction v (the approximate eigenvector of that
            eigenvalue) is at most a tenth of the eigenvalue's magnitude. Set epsilon to compare points.
        hessian_lipschitz: rho, the Lipschitz constant of the Hessian. By default it is measured along v as
            ||H(x + h v) v - H(x - h v) v|| / (2 h). For a direction that was found on a sample, that of the sample is
            used if it proves a saddle.
        search: the limits and tolerances of the search, and the method of its Hessian-vector products.
        sample_of: size of the data set from which the batches of all workers were drawn. If it exceeds the number of
            examples in these batches, the certificate has a standard error of the gradient, from the variation between
            batches.
        process_group: the group of the workers; by default torch's default group, or this process alone.
        tensor_parallel: the DeviceMesh of the workers that get the same batches, for a model with tensor parallelism.
        progress: whether rank 0 shows progress on stderr, as a bar on a terminal and as a line every ten seconds
            elsewhere; or a function that is called with a `curvature.Progress`.

    The search stops once the verdict is decided, unless `search` sets a `tolerance` that needs more products. Ctrl-C
    ends it with what is known so far: a valid, weaker certificate. A second Ctrl-C raises KeyboardInterrupt, as does
    the first one before the gradient is known.

    Raises ValueError for invalid arguments, and for losses that vary between evaluations (augmentation, shuffling).
    Raises TypeError for a model without batches, and for a point with batches.
    Raises NotFiniteError if the loss or a derivative is not finite. With hvp="double-backward", raises
    DoubleBackwardError if products by double backward are wrong.
    """
    check_positive(epsilon=epsilon, hessian_lipschitz=hessian_lipschitz)
    if sample_of is not None and sample_of < 1:
        raise ValueError(f"sample_of must be at least 1 example, got {sample_of}")
    if isinstance(model, Tensor):
        model, loss_fn, batches = _at_point(model, loss_fn, batches)
    elif batches is None:
        raise TypeError("batches must be given for a model; only a point, which is a tensor, has none")
    with (
        certifying(model, process_group) as channel,
        shown(progress, is_first=channel.group.rank == 0) as show,
    ):
        report = Reporter(show, is_alone=channel.group.size == 1)
        with report.stopping():
            # Evaluate the loss and its gradient at the current parameters, and choose the method of Hessian-vector
            # products.
            loss = mean_loss_of(model, loss_fn, batches, channel, tensor_parallel=tensor_parallel, on_batch=report.read)
            if sample_of is not None and sample_of < loss.examples:
                raise ValueError(f"sample_of must be at least the {loss.examples} examples given, got {sample_of}")
            # Choose the method before the first gradient, since a compiled model fixes its backward graph at its first
            # backward pass.
            chosen = choose_products(loss, search.hvp)
            gradient, error = loss.gradient()
            grad_norm, seconds = loss.norm(gradient), report.in_phase

            # Decide if the smallest eigenvalue, lambda_min, is below its threshold: -sqrt(rho epsilon), or 0 if no
            # epsilon is given. A gradient that is too large decides the verdict without it.
            too_large = epsilon is not None and grad_norm > epsilon
            searched = search.always or not too_large

            def decided(products: Products) -> Decision:
                whole = CurvatureSearch(products, epsilon, hessian_lipschitz, search, report)
                found = Decision(whole, search, report)
                if searched:
                    found.make(size_of_sample(loss.examples, error, grad_norm))
                return found

            found = with_products(chosen, search.hvp, decided)
            whole = found.whole
            walked = whole.verdict.rests_on_negative_curvature and not whole.is_stopped
            losses, profile = found.walk() if walked else ((), ())
            slope = None if whole.v is None else float(loss.dot(gradient, whole.v))
            evidence = _evidence(found, losses, profile)
    if sample_of == loss.examples:
        sample_of = None
    grad_norm_error = None
    if sample_of is not None:  # correct the standard error, since the examples were drawn without replacement
        grad_norm_error = error * math.sqrt(max(0.0, 1 - loss.examples / sample_of))
    return Certificate(
        **evidence,
        verdict=Verdict.GRADIENT_TOO_LARGE if too_large else whole.verdict,
        epsilon=epsilon,
        loss=loss.loss,
        grad_norm=grad_norm,
        grad_norm_error=grad_norm_error,
        failure_probability=search.failure_probability,
        threshold=None if whole.rho is None else threshold_of(epsilon, whole.rho),
        hessian_lipschitz=whole.rho,
        hessian_lipschitz_estimated=hessian_lipschitz is None,
        slope=slope,
        sample_of=sample_of,
        searched=searched,
        postponed=found.postponed if searched else _TIME_OF_A_PROOF * seconds,
        stopped=whole.is_stopped,
        bytes_sent=channel.ledger.total.sent,
        seconds=report.seconds,
    )


def _evidence(found: Decision, losses: Losses, profile: Losses) -> dict[str, Any]:
    """Return the fields of a certificate that follow from the search; collective."""
    whole, by = found.whole, found.sample or found.whole
    loss, products, ritz = whole.loss, whole.products, by.ritz
    at, values = min(losses, key=lambda pair: pair[1], default=(None, None)), dict(losses)
    sharpest = None if found.sample or whole.is_stopped else whole.sharpest
    bends = [loss.loss - (values[s] + values[-s]) / 2 for s in values if s > 0]
    return {
        "lambda_min_upper": whole.upper,
        "lambda_min_lower": whole.lower,
        "lambda_max_lower": whole.lambda_max[0],
        "lambda_max_upper": whole.lambda_max[1],
        "residual": whole.residual,
        "escape_direction": None if whole.v is None else whole.v.cpu(),
        "sharpest_direction": None if sharpest is None else sharpest.cpu(),
        "escape_distance": at[0],
        "escape_loss": at[1],
        "escape_bend": max(bends, default=None),
        "along_v": tuple(sorted((*profile, (0.0, by.loss.loss)))) if profile else (),
        "ritz_values": () if ritz is None else ritz.thetas,
        "ritz_shares": () if ritz is None else ritz.shares,
        "examples": loss.examples,
        "sample_examples": None if found.sample is None else by.loss.examples,
        "sample_hvps": 0 if found.sample is None else by.loss.products,
        "precision": str(loss.parameters[0].dtype).removeprefix("torch."),
        "hvp": products.name,
        "hvp_reason": products.reason,
        "hvp_error": whole.error,
        "hvp_step": products.step if isinstance(products, Differences) else None,
        "hvps": loss.products,
        "backward_passes": math.ceil(loss.passes),
    }


class _Point(nn.Module):
    """A model whose only parameter is a point x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(x.detach())


def _at_point(x: Tensor, function: Callable[..., Tensor], batches: Any) -> tuple[nn.Module, LossFn, list[Tensor]]:
    """Return a function of a tensor as a model, a loss function and one batch of one example."""
    if batches is not None:
        raise TypeError("batches must be None for a point: the function has the point as its only argument")
    if not x.is_floating_point():
        raise ValueError(f"model must have real numbers, but the point is {x.dtype}")
    return _Point(x), lambda model, _: function(model.x), [torch.zeros(1)]
