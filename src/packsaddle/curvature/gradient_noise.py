"""The noise that mini-batches give a gradient, compared with which artificial noise r is loud or drowned.

A worker's gradient is grad f_i plus mini-batch noise of variance tr(Cov) / b for b examples; the mean over W workers
has a W-th of it, while xi_t is the same on all workers and no mean makes it smaller. Both are multiplied by the same
learning rate and pass the same error memories, so that r sqrt(d) compares with sqrt(E||g - grad f||^2) at any of them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from packsaddle.comm.communicator import Communicator
from packsaddle.comm.group import resolve
from packsaddle.comm.ledger import Ledger
from packsaddle.curvature.hessian import LossFn, NotFiniteError, batch_size, differentiating, trainable


@dataclass(frozen=True)
class GradientNoise:
    """The measured noise: the variance of an example's gradient, and what that is for the mean of workers' batches."""

    per_example: float  # tr(Cov) of the gradient of one example
    error: float  # its standard error, from how batches differ; inf if a single pair was compared
    batch_size: float  # examples of a batch, in the mean
    batches: int  # that were compared, of all workers
    workers: int  # W, whose batches are averaged in a step
    d: int  # trainable coordinates

    @property
    def variance(self) -> float:
        """E||g - grad f||^2 of the mean g of W workers' mini-batch gradients."""
        return self.per_example / (self.batch_size * self.workers)

    @property
    def std(self) -> float:
        """sqrt(E||g - grad f||^2): the norm that mini-batch noise has."""
        return math.sqrt(self.variance)

    @property
    def std_error(self) -> float:
        """The standard error of `std`."""
        return self.std * self.error / (2 * self.per_example) if self.per_example else 0.0

    def times(self, r: float, *, momentum: float = 0.0) -> float:
        """Return r sqrt(d) as a multiple of the mini-batch noise; inf if there is none of that.

        Momentum m carries a gradient's noise on until x has moved by 1 / (1 - m) of it; xi_t is added after momentum
        and moves x once.
        """
        own = self.std / (1 - momentum)
        return r * math.sqrt(self.d) / own if own else (math.inf if r else 0.0)

    def r(self, times: float, *, momentum: float = 0.0) -> float:
        """Return the r for which r sqrt(d) is `times` the mini-batch noise, with the momentum that SGD has."""
        return times * self.std / (1 - momentum) / math.sqrt(self.d)


def gradient_noise(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    workers: int | None = None,
    process_group: Any = None,
) -> GradientNoise:
    """Measure how mini-batch gradients differ at the model's present parameters; collective, with own batches each.

    With the k-th batch of n_k examples, N_k in all so far, and m_k the mean gradient of those, each
    n_k N_{k-1} / N_k ||g_k - m_{k-1}||^2 is an unbiased estimate of an example's tr(Cov) (Welford 1962); their mean is
    the sample variance, and how they differ gives its standard error. Two vectors of d numbers are held.

    Args:
        model: a network; put in eval mode meanwhile, so that noise of dropout and of batch statistics is not counted.
        loss_fn: loss_fn(model, batch) is the batch's mean loss.
        batches: at least two on every worker, drawn as in training; eight give the deviation to about a tenth.
        workers: W, if not the process group's: how many workers' batches are averaged in a step.
        process_group: the workers; None for the default group, or this process alone.

    Raises ValueError for bad arguments, NotFiniteError if a gradient is not finite.
    """
    group = resolve(process_group)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")

    # Sums over workers: of tr(Cov)'s estimates n_k N_{k-1} / N_k ||g_k - m_{k-1}||^2, of their squares and numbers.
    apart, examples, d = _apart(model, loss_fn, batches)
    found = torch.tensor(apart, dtype=torch.float64)
    counts = torch.tensor([len(apart), examples, not apart], dtype=torch.float64)
    sums = torch.cat([found.sum().view(1), found.square().sum().view(1), counts])
    sums = sums.to(next(model.parameters()).device)
    total, squares, count, seen, short = Communicator(group, Ledger()).mean(sums, "noise").mul_(group.size).tolist()
    if short:  # on all workers alike
        raise ValueError("batches must be at least 2 on every worker, for their gradients to differ")
    if not math.isfinite(total):
        raise NotFiniteError("a mini-batch gradient is not finite at the present parameters")

    # Their mean, and the variance of it: (sum of squares / K - mean^2) / (K - 1).
    mean = total / count
    spread = max(0.0, squares / count - mean * mean) / (count - 1) if count > 1 else math.inf
    drawn = int(count) + group.size
    return GradientNoise(mean, math.sqrt(spread), seen / drawn, drawn, group.size if workers is None else workers, d)


def _apart(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> tuple[list[float], int, int]:
    """Return the estimates of tr(Cov), the number of examples, and d."""
    parameters = trainable(model)
    mean = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    found: list[float] = []
    seen = 0
    with differentiating(model):
        for batch in batches:
            n = batch_size(batch)
            grads = torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)
            square = _move(mean, grads, n / (seen + n))
            if seen:
                found.append(n * seen / (seen + n) * square)
            seen += n
    return found, seen, sum(p.numel() for p in parameters)


@torch.no_grad()
def _move(mean: list[Tensor], grads: tuple[Tensor | None, ...], weight: float) -> float:
    """Move the mean gradient towards another by its weight, in place; return the square of how far apart they were."""
    square = torch.zeros((), dtype=torch.float64, device=mean[0].device)
    for m, g in zip(mean, grads, strict=True):
        apart = -m if g is None else g.detach() - m
        square += apart.double().square().sum()
        m.add_(apart, alpha=weight)
    return float(square)
