"""Improve or localise (Jin et al. 2021, Lemma 24): a run that has moved far has lowered the objective much."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from packsaddle.theory.diagnostics.trajectory import Trajectory


@dataclass(frozen=True)
class Localisation:
    """Both sides of the lemma for tau = 0 .. t."""

    moved: Tensor  # ||y_{t0 + tau} - y_{t0}||^2, float64[t + 1]
    bound: Tensor  # eta t [f(x_t0) - f(x_{t0 + tau}) + eta chi^2 (eta l t + iota)], the bound for c = 1, float64[t + 1]
    constant: float  # the smallest c with moved <= c bound throughout; inf if there is none


def improve_or_localise(
    trajectory: Trajectory,
    *,
    smoothness: float,
    noise_variance: float | None = None,
    iota: float = 1.0,
    begin: int = 0,
    horizon: int | None = None,
) -> Localisation:
    """Compare the two sides of ||y_{t0+tau} - y_t0||^2 <= c eta t [f(x_t0) - f(x_{t0+tau}) + eta s^2 (eta l t + iota)].

    Jin et al. prove it (arXiv 1902.04811, Lemma 24) for x without compression, for every tau <= t at once, with an
    absolute constant c and a probability that iota sets; the paper uses it for y. t0 is `begin` and t is `horizon`, by
    default the rest of the trajectory; l is `smoothness` and s^2 `noise_variance`, by default chi^2 of the trajectory's
    method at t0, sigma^2 + d r^2. Both sides are in squared units of x. Raises ValueError for a horizon outside the
    trajectory, and unless smoothness and iota are positive.
    """
    last = len(trajectory.x) - 1
    t = last - begin if horizon is None else horizon
    if not (0 <= begin < begin + t <= last):
        raise ValueError(f"begin + horizon must be at most {last} steps and horizon at least 1, got {begin} + {t}")
    for name, value in (("smoothness", smoothness), ("iota", iota)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite, got {value}")
    oracle, method = trajectory.oracle, trajectory.method
    variance = method.chi_squared(oracle, oracle.problem.d, begin) if noise_variance is None else noise_variance
    window = slice(begin, begin + t + 1)
    f = torch.stack([oracle.problem(x) for x in trajectory.x[window]])
    eta = method.lr
    bound = eta * t * (f[0] - f + eta * variance * (eta * smoothness * t + iota))
    moved = (trajectory.y[window] - trajectory.y[begin]).square().sum(1)
    return Localisation(moved, bound, _smallest_constant(moved, bound))


def _smallest_constant(moved: Tensor, bound: Tensor) -> float:
    """The largest ratio; a move that is not 0 under a bound that is not positive needs c = inf."""
    if bool(((moved > 0) & (bound <= 0)).any()):
        return math.inf
    ratios = moved[moved > 0] / bound[moved > 0]
    return float(ratios.max()) if len(ratios) else 0.0
