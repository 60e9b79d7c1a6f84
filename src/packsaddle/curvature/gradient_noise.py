"""Mini-batch noise of gradients, to compare with the artificial noise xi_t, whose coordinates have the standard
deviation r.

The gradient of worker i on b examples is grad f_i plus mini-batch noise of variance tr(Cov) / b, where Cov is the
covariance of one example's gradient. The mean g over W workers divides this variance by W. It does not divide the
variance of xi_t, which is identical on all workers. The norm of xi_t is about r sqrt(d), and the norm of the mini-batch
noise is about sqrt(E||g - grad f||^2). The ratio of these norms does not depend on the learning rate or on error
feedback, since both kinds of noise are scaled by the same learning rate and pass the same error memories.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from packsaddle.comm.group import resolve
from packsaddle.curvature.mean_loss import LossFn, NotFiniteError, batch_size, differentiating, trainable
from packsaddle.numerics.devices import device_of_doubles, wide, widened


@dataclass(frozen=True)
class GradientNoise:
    """Measured mini-batch noise of gradients.

    `per_example` is the variance of the gradient of one example. `variance` is the variance of a step's gradient, which
    is the mean over the batches of all workers.
    """

    per_example: float  # variance tr(Cov) of the gradient of one example, summed over the coordinates
    error: float  # standard error of `per_example`, from the variation between batches; inf: only two batches
    batch_size: float  # mean number of examples in a batch
    batches: int  # number of batches that were measured, over all workers
    workers: int  # W, number of workers whose batches are averaged in a step
    d: int  # number of trainable coordinates

    @property
    def variance(self) -> float:
        """The variance of a step's gradient g, the mean over W workers: E||g - grad f||^2."""
        return self.per_example / (self.batch_size * self.workers)

    @property
    def std(self) -> float:
        """The root mean square norm of a step's mini-batch noise, sqrt(E||g - grad f||^2)."""
        return math.sqrt(self.variance)

    @property
    def std_error(self) -> float:
        """The standard error of the estimate `std`, from the variation between batches."""
        return self.std * self.error / (2 * self.per_example) if self.per_example else 0.0

    def times(self, r: float) -> float:
        """Return the ratio of the norms of two kinds of noise: artificial noise of standard deviation r, and mini-batch
        noise.

        The norms are r sqrt(d) and `std`. The ratio is the same for SGD with momentum, which accumulates both kinds of
        noise in the same way. If `std` is 0, the result is inf, or 0 if r is 0 too.
        """
        return r * math.sqrt(self.d) / self.std if self.std else (math.inf if r else 0.0)

    def r(self, times: float) -> float:
        """Return the standard deviation r of artificial noise whose norm, r sqrt(d), is the norm of mini-batch noise
        multiplied by `times`."""
        return times * self.std / math.sqrt(self.d)


def gradient_noise(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    workers: int | None = None,
    process_group: Any = None,
) -> GradientNoise:
    """Measure the variance of mini-batch gradients at the model's current parameters; collective.

    The k-th batch has n_k examples and gradient g_k; the first k batches have N_k examples and mean gradient m_k. Each
    n_k N_{k-1} / N_k ||g_k - m_{k-1}||^2 is an unbiased estimate of an example's tr(Cov) (Welford 1962). The mean of
    these estimates is the sample variance, and their variation gives its standard error.

    Args:
        model: a network, evaluated in eval mode to exclude noise from dropout and batch statistics.
        loss_fn: loss_fn(model, batch) is the batch's mean loss.
        batches: at least two batches of this worker, drawn as in training; eight determine `std` to about 10%.
        workers: W, the number of workers whose batches a step averages; by default the size of the process group.
        process_group: the group of the workers; by default torch's default group, or this process alone.

    Raises ValueError for invalid arguments, and NotFiniteError if a gradient is not finite.
    """
    group = resolve(process_group)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")

    # Sum over all workers the estimates n_k N_{k-1} / N_k ||g_k - m_{k-1}||^2 of tr(Cov), their squares and their
    # number.
    apart, examples, d = _sum_of_squares(model, loss_fn, batches)
    found = torch.tensor(apart, dtype=torch.float64)
    counts = torch.tensor([len(apart), examples, not apart], dtype=torch.float64)
    sums = torch.cat([found.sum().view(1), found.square().sum().view(1), counts])
    sums = sums.to(device_of_doubles(next(model.parameters()).device))
    group.all_reduce(sums)
    total, squares, count, seen, short = sums.tolist()
    # `short`, the number of workers with fewer than two batches, is identical on all workers, so all of them raise the
    # error.
    if short:
        raise ValueError("batches must be at least 2 on every worker, for their gradients to differ")
    if not math.isfinite(total):
        raise NotFiniteError("a mini-batch gradient is not finite at the present parameters")

    # Compute the mean of the estimates and the variance of this mean, (sum of squares / K - mean^2) / (K - 1).
    mean = total / count
    spread = max(0.0, squares / count - mean * mean) / (count - 1) if count > 1 else math.inf
    drawn = int(count) + group.size
    return GradientNoise(mean, math.sqrt(spread), seen / drawn, drawn, group.size if workers is None else workers, d)


def _sum_of_squares(model: nn.Module, loss_fn: LossFn, batches: Iterable[Any]) -> tuple[list[float], int, int]:
    """Compute estimates of tr(Cov), the variance of one example's gradient, from this worker's batches.

    Returns the list of estimates, the number of examples in this worker's batches, and the number d of trainable
    coordinates. There is one estimate for each batch after the first.
    """
    parameters = trainable(model)
    mean = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
    found: list[float] = []
    seen = 0
    # Restore the state of torch's generator at the end, since a DataLoader draws its seeds from it.
    with torch.random.fork_rng(devices=()), differentiating(model):
        for batch in batches:
            n = batch_size(batch)
            grads = torch.autograd.grad(loss_fn(model, batch), parameters, allow_unused=True)
            # Measure the squared distance between this batch's gradient and the mean gradient of the batches before it.
            # Then update the mean.
            square = torch.zeros((), dtype=wide(mean[0].device), device=mean[0].device)
            for m, g in zip(mean, grads, strict=True):
                apart = -m if g is None else g.detach() - m
                # Move the sum to one device, since the parameters may be on several devices.
                square += widened(apart).square().sum().to(square.device)
                m.add_(apart, alpha=n / (seen + n))
            if seen:
                found.append(n * seen / (seen + n) * float(square))
            seen += n
    return found, seen, sum(p.numel() for p in parameters)
