"""Escape from saddle points: coupled runs, and escape times over seeds.

Coupling sequences (section 3.2; Jin et al. 2021) are two runs that differ in the sign of the noise along v_1 alone.
The function `Octopus` has a sequence of saddles, one per leg, which a run escapes one after the other.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lab.paper.problems import Octopus, Oracle, Problem
from lab.paper.proof.error_growth import accumulate
from lab.paper.proof.trajectory import Method, Run, Trajectory, follow
from packsaddle import Noise


@dataclass(frozen=True)
class Coupling:
    """The coupling sequences of the proof: two runs from one point, with opposite noise along v_1 at `scale` 1.

    theta_t and the compressor's randomness are the same in both. Gaps are norms of differences between the two
    (section 3.2; Jin et al. 2021).

    >>> import torch
    >>> from lab.paper.proof import Method, couple
    >>> from lab.paper.problems import Oracle, QuadraticQuartic
    >>> start = torch.zeros(3, dtype=torch.float64)
    >>> coupled = couple(Oracle(QuadraticQuartic(3)), Method(0.1, noise=0.01), start, steps=10)
    >>> coupled.gamma, coupled.along.shape
    (1.0, torch.Size([11]))
    """

    first: Trajectory  # x_t
    second: Trajectory  # x'_t
    direction: Tensor  # v_1, float64[d], of norm 1
    gamma: float  # -v_1^T H v_1 at x_0
    along: Tensor  # <v_1, x_t - x'_t>, signed, float64[T + 1]
    x_gap: Tensor  # float64[T + 1]
    y_gap: Tensor  # float64[T + 1]
    e_gap: Tensor  # float64[T + 1]
    gradient_gap: Tensor  # ||grad F(x_t, theta_t) - grad F(x'_t, theta_t)||, float64[T]
    noise_gap: Tensor  # ||xi_t - xi'_t||, float64[T]
    f: Tensor  # f(x_t), float64[T + 1]
    f_mirrored: Tensor  # f(x'_t), float64[T + 1]
    predicted_std: Tensor  # standard deviation of `along` that `coupling_std` predicts on a quadratic, float64[T + 1]

    def growth_rate(self, begin: int, end: int | None = None) -> float:
        """Return the slope of ln |<v_1, x_t - x'_t>| per step over begin <= t < end, by least squares.

        Raises ValueError if fewer than two points are left or the difference is 0 at one of them.
        """
        logs = self.along[begin:end].abs().log()
        if len(logs) < 2 or not torch.isfinite(logs).all():
            zeros = int((self.along[begin:end] == 0).sum())
            raise ValueError(f"growth_rate needs two or more differences, none 0, got {len(logs)} with {zeros} zeros")
        t = torch.arange(len(logs), dtype=torch.float64)
        t = t - t.mean()
        return float(t @ logs / (t @ t))

    def e_gap_bound(self, mu: float) -> Tensor:
        """Return the bound on E||e_t - e'_t||^2 for linear compressors, float64[T + 1] (section 3.2, Lemma B.17).

        `mu` is C's contraction. For linear C, e - e' is the error memory of the difference of the two gradients, so
        Lemma A.5 holds with ||grad F - grad F' + xi - xi'||^2, at most (gradient_gap + noise_gap)^2, in place of ||grad
        f||^2 + chi^2. It is about means: average both sides over seeds. Other compressors need not obey it.
        """
        return accumulate((self.gradient_gap + self.noise_gap).square(), mu)


def negative_curvature(problem: Problem, x: Tensor) -> tuple[float, Tensor]:
    """Return (gamma, v_1): -lambda_min of a problem's Hessian at x, float[d], and its unit eigenvector, float64[d].

    The Hessian of `problem` is computed as a dense matrix, so d must be small. Raises ValueError if no eigenvalue is
    negative.

    >>> import torch
    >>> from lab.paper.proof import negative_curvature
    >>> from lab.paper.problems import QuadraticQuartic
    >>> gamma, v = negative_curvature(QuadraticQuartic(3), torch.zeros(3, dtype=torch.float64))
    >>> gamma, v.abs()
    (1.0, tensor([1., 0., 0.], dtype=torch.float64))
    """
    eigenvalues, vectors = torch.linalg.eigh(_hessian(problem, x))
    if not float(eigenvalues[0]) < 0:
        raise ValueError(f"x must have a direction of negative curvature, its lambda_min is {float(eigenvalues[0])}")
    return -float(eigenvalues[0]), vectors[:, 0].contiguous()


def reflect(xi: Tensor, direction: Tensor, scale: float = 1.0) -> Tensor:
    """Return xi - 2 scale <v, xi> v, float[d], for a unit vector v, the `direction`; at scale 1 it has the law of xi.

    >>> import torch
    >>> from lab.paper.proof import reflect
    >>> reflect(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0]))
    tensor([-3.,  4.])
    """
    return xi - 2 * scale * (direction @ xi) * direction


def couple(
    oracle: Oracle,
    method: Method,
    start: Tensor,
    *,
    steps: int,
    direction: Tensor | None = None,
    seed: int = 0,
    scale: float = 1.0,
) -> Coupling:
    """Run the coupling sequences of a `method` on an `oracle` from `start`, float[d], for T = `steps`.

    `seed` is that of xi_t and of the compressor. `direction`, float[d], is v_1 up to scale; None is the eigenvector of
    lambda_min at `start`. The second run's noise is `reflect(xi_t, v_1, scale)`: 1 gives the proof's coupling, in which
    both runs have the law of Algorithm 1; less, a smaller perturbation of the same shape, to see whether gaps scale
    with it. Raises ValueError for a direction of the wrong shape or norm zero, at a point without negative curvature if
    there is no `direction`, and see `follow`.

    >>> import torch
    >>> from lab.paper.proof import Method, couple
    >>> from lab.paper.problems import Oracle, QuadraticQuartic
    >>> start = torch.zeros(3, dtype=torch.float64)
    >>> coupled = couple(Oracle(QuadraticQuartic(3)), Method(0.1, noise=0.01), start, steps=50)
    >>> coupled.along[-1].abs() > coupled.along[10].abs()
    tensor(True)
    """
    v = _unit(oracle.problem, start, direction)
    perturbation = Noise(method.noise)

    def correction(t: int) -> Tensor | None:
        """Return xi'_t - xi_t, which is added to the second run's gradient; xi_t is a function of (seed, t)."""
        xi = perturbation.vector(v, seed=seed, step=t)
        return None if xi is None else reflect(xi, v, scale) - xi

    first = follow(oracle, method, start, steps=steps, seed=seed)
    second = follow(oracle, method, start, steps=steps, seed=seed, disturbance=correction)
    gamma = -float(v @ _hessian(oracle.problem, start) @ v)
    corrections = [correction(t) for t in range(steps)]
    return Coupling(
        first,
        second,
        direction=v,
        gamma=gamma,
        along=(first.x - second.x) @ v,
        x_gap=_gap(first.x, second.x),
        y_gap=_gap(first.y, second.y),
        e_gap=_gap(first.e, second.e),
        gradient_gap=_gap(first.gradients, second.gradients),
        noise_gap=torch.tensor([0.0 if c is None else float(c.norm()) for c in corrections], dtype=torch.float64),
        f=first.objective(),
        f_mirrored=second.objective(),
        predicted_std=scale * coupling_std(steps, eta=method.lr, gamma=gamma, noise=method.noise),
    )


def _unit(problem: Problem, start: Tensor, direction: Tensor | None) -> Tensor:
    if direction is None:
        return negative_curvature(problem, start)[1]
    if direction.shape != (problem.d,) or not float(direction.norm()) > 0:
        raise ValueError(f"direction must be a vector of {problem.d} coordinates, not all 0, got {direction}")
    v: Tensor = direction.to(torch.float64)
    return v.div(v.norm())


def _hessian(problem: Problem, x: Tensor) -> Tensor:
    hessian: Tensor = torch.autograd.functional.hessian(problem, x.detach().to(torch.float64))  # type: ignore[no-untyped-call]
    return hessian


def _gap(a: Tensor, b: Tensor) -> Tensor:
    gap: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return gap


@dataclass(frozen=True)
class EscapeTimes:
    """The numbers of steps until runs had left the ball, one per seed, in the order of seeds.

    >>> import torch
    >>> from lab.paper.proof import EscapeTimes
    >>> EscapeTimes(torch.tensor([10.0, 12.0, 20.0]), improved=3).median
    12.0
    """

    times: Tensor  # steps, float64[seeds]; inf for a run that did not escape within the limit
    improved: int  # number of escapes that line 6 of Algorithm 1 accepts, since f(x_t) < f(x_0)

    def quantile(self, q: float) -> float:
        """Return the q-quantile of the times: the lower of the two nearest observed times. It may be inf."""
        return float(torch.quantile(self.times, q, interpolation="lower"))

    @property
    def median(self) -> float:
        """The median number of steps."""
        return self.quantile(0.5)


def escape_times(
    oracle: Oracle, method: Method, start: Tensor, *, radius: float, limit: int, seeds: int
) -> EscapeTimes:
    """Run a `method` from `start`, float[d], until Algorithm 1's check (line 5) finds ||y_t - x_0|| > R = `radius`.

    Run s of `seeds` uses seed s for the optimizer and the oracle's seed plus s. Raises ValueError unless `seeds` and
    `limit`, in steps, are at least 1, and see `Run` and `Escape`.

    >>> import torch
    >>> from lab.paper.proof import Method, escape_times
    >>> from lab.paper.problems import Oracle, QuadraticQuartic
    >>> start = torch.zeros(3, dtype=torch.float64)
    >>> found = escape_times(
    ...     Oracle(QuadraticQuartic(3)), Method(0.1, noise=0.1), start, radius=0.5, limit=200, seeds=2
    ... )
    >>> found.times.shape
    torch.Size([2])
    """
    for name, value in (("seeds", seeds), ("limit", limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    times, improved = [], 0
    for s in range(seeds):
        run = Run(replace(oracle, seed=oracle.seed + s), method, start, seed=s, segment=(limit, radius))
        resets = run.optimizer.resets
        while run.optimizer.steps < limit and not resets:
            run.advance()
        times.append(float(resets[0].step) if resets else math.inf)
        improved += sum(reset.committed for reset in resets)
    return EscapeTimes(torch.tensor(times, dtype=torch.float64), improved)


def octopus_escapes(problem: Octopus, points: Tensor) -> list[int]:
    """Return the steps at which a trajectory enters the next leg of an Octopus: one per saddle that it leaves.

    `points` are the trajectory, float[T + 1, d], on the `problem`. A leg entered twice counts twice, so "exactly d
    escapes" says that no saddle was visited again. Raises ValueError where the trajectory leaves the domain of the
    function.

    >>> import torch
    >>> from lab.paper.proof import octopus_escapes
    >>> from lab.paper.problems import Octopus
    >>> f = Octopus(2)
    >>> octopus_escapes(f, torch.tensor([[0.1, 0.1], [3.0, 0.1], [6.0, 3.0]], dtype=torch.float64))
    [2]
    """
    for x in points:
        problem(x)
    stages = [problem.stage(x) for x in points]
    return [t for t in range(1, len(stages)) for _ in range(stages[t] - stages[t - 1])]


def coupling_std(steps: int, *, eta: float, gamma: float, noise: float | Callable[[int], float]) -> Tensor:
    """Return the std of <v_1, x_t - x'_t> of coupled, uncompressed runs on a quadratic, float64[steps + 1].

    `eta` is the step size, `gamma` = -lambda_min and `noise` r. The difference obeys delta_{t+1} = (1 + eta gamma)
    delta_t - 2 eta <v_1, xi_t> exactly, so its variance obeys V_{t+1} = (1 + eta gamma)^2 V_t + (2 eta r)^2. For eta
    gamma << 1 << eta gamma t its root is about 2 r sqrt(eta / (2 gamma)) (1 + eta gamma)^t, the signal q_p of Jin et
    al. 2021.

    >>> from lab.paper.proof import coupling_std
    >>> coupling_std(3, eta=0.1, gamma=1.0, noise=0.01)
    tensor([0.0000, 0.0020, 0.0030, 0.0038], dtype=torch.float64)
    """
    perturbation, variance = Noise(noise), [0.0]
    for t in range(steps):
        variance.append((1 + eta * gamma) ** 2 * variance[-1] + (2 * eta * perturbation.at_step(t)) ** 2)
    return torch.tensor(variance, dtype=torch.float64).sqrt()
