"""Trajectories of `CompressedSGD` on a problem: x_t, y_t, e_t and the stochastic gradients for every t.

"Improve or localize" (Jin et al. 2021, Lemma 24) says that a run that has moved far has decreased the objective a lot.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lab.paper.problems import Oracle
from packsaddle import CompressedSGD, Compression, Escape, Noise
from packsaddle.compressors import Compressor, Identity


@dataclass(frozen=True)
class Method:
    """The settings of the optimizer of a diagnostic: those of Algorithm 1 without resets.

    Raises ValueError unless `lr` is positive and finite.

    >>> from packsaddle import TopK
    >>> from lab.paper.proof import Method
    >>> Method(0.1, TopK(0.5), noise=0.01).lr
    0.1
    """

    lr: float  # the step size eta
    compressor: Compressor = field(default_factory=Identity)  # C
    noise: float | Callable[[int], float] = 0.0  # r, the std of each coordinate of xi_t, or a function of the step
    error_feedback: bool = True  # False: line 12 leaves e = 0, for comparison

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr of Method must be positive and finite, got {self.lr}")

    def chi_squared(self, oracle: Oracle, d: int, step: int) -> float:
        """Return chi^2 = sigma^2 + E||xi_t||^2 = sigma^2 + d r^2 at a `step`, with sigma the `oracle`'s.

        It is in the units of a squared gradient (Lemma A.5).
        """
        return oracle.sigma**2 + d * Noise(self.noise).at_step(step) ** 2


@dataclass(frozen=True)
class Trajectory:
    """The record of T steps from x_0, for all t (the same on every worker, `gradients` excepted).

    >>> import torch
    >>> from lab.paper.proof import Method, follow
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> start = torch.ones(2, dtype=torch.float64)
    >>> run = follow(Oracle(Quadratic((1.0, 2.0))), Method(0.1), start, steps=3)
    >>> run.x.shape, run.e.abs().max()
    (torch.Size([4, 2]), tensor(0., dtype=torch.float64))
    """

    oracle: Oracle  # the source of the stochastic gradients
    method: Method  # the settings of the optimizer
    x: Tensor  # float64[T + 1, d]
    y: Tensor  # float64[T + 1, d], x_t - eta e_t
    e: Tensor  # float64[T + 1, d], the error memory, the mean over workers
    gradients: Tensor  # float64[T, d], this worker's grad F(x_t, theta_t), without xi_t

    def objective(self) -> Tensor:
        """Return f(x_t), float64[T + 1]."""
        return torch.stack([self.oracle.problem(x) for x in self.x])


class Run:
    """`CompressedSGD` on a problem, a step at a time; its workers are the group it finds itself in (see `simulate`).

    `segment` is (I, R): the escape check of lines 4-8. Raises ValueError if `start` is not a vector of the problem's
    dimension or the oracle was made for another number of workers, and what `CompressedSGD` raises.
    """

    def __init__(
        self, oracle: Oracle, method: Method, start: Tensor, *, seed: int, segment: tuple[int, float] | None = None
    ) -> None:
        if start.shape != (oracle.problem.d,):
            raise ValueError(f"start must have shape ({oracle.problem.d},), got {tuple(start.shape)}")
        self._oracle, self._forgets = oracle, not method.error_feedback
        self._parameter = nn.Parameter(start.detach().to(torch.float64, copy=True))
        escape = None if segment is None else Escape(*segment, lambda: oracle.problem(self.x))
        self.optimizer = CompressedSGD(
            [self._parameter],
            method.lr,
            Compression(method.compressor, dense_below=0),
            noise=Noise(method.noise, lazy=False),  # not lazy, since e_t and y_t are read after each step
            escape=escape,
            seed=seed,
        )
        self._rank, workers = self.optimizer.channel.group.rank, self.optimizer.channel.group.size
        if workers != oracle.workers:
            raise ValueError(f"oracle was made for {oracle.workers} workers, but {workers} run")

    @property
    def x(self) -> Tensor:
        """x_t, float64[d]: the parameter itself, which the next step changes."""
        return self._parameter.detach()

    def advance(self, disturbance: Tensor | None = None) -> Tensor:
        """Do one step, and return its stochastic gradient without `disturbance`, float64[d].

        The optimizer gets the sum of the gradient and `disturbance`.
        """
        gradient = self._oracle.gradient(self.x, step=self.optimizer.steps, worker=self._rank)
        self._parameter.grad = gradient if disturbance is None else gradient + disturbance
        self.optimizer.step()
        if self._forgets:
            self.optimizer.state[self._parameter]["error"].zero_()
        return gradient


def follow(
    oracle: Oracle,
    method: Method,
    start: Tensor,
    *,
    steps: int,
    seed: int = 0,
    disturbance: Callable[[int], Tensor | None] | None = None,
) -> Trajectory:
    """Run T = `steps` iterations of a `method` from `start`, float[d], without resets, and record them.

    The gradients' randomness is the oracle's; xi_t and the compressor's are functions of (seed, t). `disturbance(t)`,
    float64[d], is added to the gradient at step t. Raises ValueError if `steps` is below 1, and see `Run`.

    >>> import torch
    >>> from packsaddle import TopK
    >>> from lab.paper.proof import Method, follow
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> start = torch.ones(2, dtype=torch.float64)
    >>> run = follow(Oracle(Quadratic((1.0, 2.0))), Method(0.1, TopK(k=1)), start, steps=2)
    >>> run.x[-1]
    tensor([0.8000, 0.8000], dtype=torch.float64)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    run = Run(oracle, method, start, seed=seed)
    xs, ys, es, gradients = [], [], [], []
    for t in range(steps + 1):
        xs.append(run.x.clone())
        ys.append(run.optimizer.corrected())
        es.append(run.optimizer.error())
        if t < steps:
            gradients.append(run.advance(disturbance(t) if disturbance else None))
    return Trajectory(oracle, method, torch.stack(xs), torch.stack(ys), torch.stack(es), torch.stack(gradients))


@dataclass(frozen=True)
class Localisation:
    """Both sides of the inequality that `improve_or_localise` checks, for tau = 0 .. t.

    >>> import torch
    >>> from lab.paper.proof import Method, follow, improve_or_localise
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> run = follow(Oracle(Quadratic((1.0, 2.0))), Method(0.1), torch.ones(2, dtype=torch.float64), steps=5)
    >>> lemma = improve_or_localise(run, smoothness=2.0)
    >>> lemma.moved.shape, lemma.bound.shape
    (torch.Size([6]), torch.Size([6]))
    """

    moved: Tensor  # ||y_{t0 + tau} - y_{t0}||^2, float64[t + 1]
    bound: Tensor  # the bound for c = 1: eta t [f(x_t0) - f(x_{t0 + tau}) + eta s^2 (eta l t + iota)], float64[t + 1]
    constant: float  # the smallest c with moved <= c bound for every tau; inf if there is none


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

    >>> import torch
    >>> from lab.paper.proof import Method, follow, improve_or_localise
    >>> from lab.paper.problems import Oracle, Quadratic
    >>> run = follow(Oracle(Quadratic((1.0, 2.0))), Method(0.1), torch.ones(2, dtype=torch.float64), steps=5)
    >>> improve_or_localise(run, smoothness=2.0).moved.shape
    torch.Size([6])
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
    """Return the smallest c with moved <= c bound everywhere: the largest ratio of the two.

    It is inf if `moved` is positive somewhere and `bound` is not.
    """
    if bool(((moved > 0) & (bound <= 0)).any()):
        return math.inf
    ratios = moved[moved > 0] / bound[moved > 0]
    return float(ratios.max()) if len(ratios) else 0.0
