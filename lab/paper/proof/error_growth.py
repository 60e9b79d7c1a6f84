"""The growth of the error memory, compared with Lemma A.5's bound, and the effect of a small change of its input."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.paper.problems import Oracle
from lab.paper.proof.trajectory import Method, follow
from packsaddle.compressors import Compressor


@dataclass(frozen=True)
class ErrorGrowth:
    """The growth of E||e_t||^2, measured over seeds, and Lemma A.5's bound, in the units of a squared gradient.

    >>> import torch
    >>> from packsaddle import RandomK
    >>> from lab.paper.proof import Method, error_growth
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> oracle, start = Oracle(Quadratic((1.0,) * 8), sigma=0.1), torch.ones(8, dtype=torch.float64)
    >>> growth = error_growth(oracle, Method(0.01, RandomK(0.25, block_size=1)), start, steps=5, seeds=8)
    >>> growth.seeds, bool((growth.mean <= growth.bound + 1e-9).all())
    (8, True)
    """

    mean: Tensor  # float64[T + 1], the mean of ||e_t||^2 over seeds
    standard_error: Tensor  # float64[T + 1], the standard error of `mean`
    bound: Tensor  # float64[T + 1], the bound of Lemma A.5
    seeds: int  # number of runs


def accumulate(energy: Tensor, mu: float) -> Tensor:
    """Return (2 (1 - mu) / mu) sum_{i < t} (1 - mu/2)^(t - i) energy_i for t = 0 .. T, float64[T + 1].

    It is Lemma A.5's bound with `energy`, energy_i = E||grad f(x_i)||^2 + chi^2, float[T]. Raises ValueError unless mu
    is in (0, 1].

    >>> import torch
    >>> from lab.paper.proof import accumulate
    >>> accumulate(torch.ones(3, dtype=torch.float64), mu=0.5)
    tensor([0.0000, 1.5000, 2.6250, 3.4688], dtype=torch.float64)
    """
    _check_mu(mu)
    bound = [0.0]
    for value in energy.tolist():  # a step multiplies the whole sum, its newest term included, by 1 - mu/2
        bound.append((1 - mu / 2) * (bound[-1] + 2 * (1 - mu) / mu * value))
    return torch.tensor(bound, dtype=torch.float64)


def random_k_limit(mu: float) -> float:
    """Return lim E||e_t||^2 / ||g||^2 for a constant gradient g and RandomK: (1 - mu)(2 - mu) / mu^2.

    A coordinate of e_t is g_i times the number A of steps since it was last sent, and P(A = a) = mu (1 - mu)^a; this
    is E A^2. Lemma A.5's bound tends to twice that. Raises ValueError unless mu is in (0, 1].

    >>> from lab.paper.proof import random_k_limit
    >>> round(random_k_limit(0.1), 3), random_k_limit(1.0)
    (171.0, 0.0)
    """
    _check_mu(mu)
    return (1 - mu) * (2 - mu) / mu**2


def error_growth(
    oracle: Oracle, method: Method, start: Tensor, *, steps: int, seeds: int, mu: float | None = None
) -> ErrorGrowth:
    """Measure E||e_t||^2 over runs of T = `steps` from `start`, float[d], and bound it by Lemma A.5.

    Runs of the `method` share nothing but the problem.
    `mu` is the compressor's contraction for every vector, `compressor.mu(d)`, unless a larger one is known to hold.
    E||grad f(x_i)||^2 in the bound is the mean over the same runs. Run s of `seeds` uses seed s for the optimizer and
    the oracle's seed plus s. Raises ValueError if `seeds` is below 2 (no standard error), and see `follow`.

    >>> import torch
    >>> from packsaddle import RandomK
    >>> from lab.paper.proof import Method, error_growth
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> oracle, start = Oracle(Quadratic((1.0,) * 8), sigma=0.1), torch.ones(8, dtype=torch.float64)
    >>> error_growth(oracle, Method(0.01, RandomK(0.25)), start, steps=5, seeds=4).mean.shape
    torch.Size([6])
    """
    if seeds < 2:
        raise ValueError(f"seeds must be at least 2, got {seeds}")
    d = oracle.problem.d
    squares, slopes = [], []
    for s in range(seeds):
        run = follow(replace(oracle, seed=oracle.seed + s), method, start, steps=steps, seed=s)
        squares.append(run.e.square().sum(1))
        slopes.append(torch.stack([oracle.problem.gradient(x).square().sum() for x in run.x[:-1]]))
    measured = torch.stack(squares)
    chi_squared = torch.tensor([method.chi_squared(oracle, d, t) for t in range(steps)], dtype=torch.float64)
    return ErrorGrowth(
        mean=measured.mean(0),
        standard_error=measured.std(0) / seeds**0.5,
        bound=accumulate(torch.stack(slopes).mean(0) + chi_squared, method.compressor.mu(d) if mu is None else mu),
        seeds=seeds,
    )


def residual_gap(compressor: Compressor, v: Tensor, change: Tensor, *, seed: int = 0, step: int = 0) -> float:
    """Return ||(v + change - C(v + change)) - (v - C(v))|| for one draw of C's randomness; v and change float[d].

    It is the effect of one step on a small difference; C is the `compressor`, its randomness that of (`seed`, `step`).
    Linear compressors shrink it in expectation, to sqrt(1 - mu) ||change||
    at most; TopK of a vector of ones can turn any change, however small, into sqrt(2 k) (section 3.1).

    >>> import torch
    >>> from packsaddle import TopK
    >>> from lab.paper.proof import residual_gap
    >>> round(residual_gap(TopK(k=1), torch.tensor([1.0, 0.99]), torch.tensor([0.0, 0.02])), 3)
    1.407
    """
    disturbed = v + change
    residuals = [u - compressor(u, seed=seed, step=step) for u in (v, disturbed)]
    return float((residuals[1] - residuals[0]).norm())


def _check_mu(mu: float) -> None:
    if not 0 < mu <= 1:
        raise ValueError(f"mu must be in (0, 1], got {mu}")
