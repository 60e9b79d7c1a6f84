"""Problems against autograd: gradients, critical points with their spectra, constants; and the oracle's assumptions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lab.paper import problems
from lab.paper.problems import Octopus, Oracle, Problem

PROBLEMS: list[Problem] = [
    problems.Cosine(4),
    problems.Cosine(4, width=0.3),
    problems.DoubleWells(4),
    problems.Quadratic((-0.5, 2.0, 0.0), slopes=(1.0, -3.0, 0.0)),
    problems.QuadraticQuartic(4),
    problems.QuadraticQuartic(1),
    problems.RankOnePCA((3.0, 2.0, 0.5)),
    problems.PhaseRetrieval(4, scale=1.3),
    problems.MatrixFactorisation((3.0, 2.0, 0.5), 2),
    problems.MatrixFactorisation((3.0, 1.0), 1),
    problems.MatrixFactorisation((3.0, 2.0), 2),
    problems.OrthogonalTensor(4),
    problems.OrthogonalTensor(3, beta=1.2),
    problems.OrthogonalTensor(1, beta=4.0),
    problems.CurvedValley(),
    problems.MonkeySaddle(),
    Octopus(4),
]
by_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=repr)


def points_of(problem: Problem, n: int = 20) -> list[Tensor]:
    """Points at which a problem is defined, float64[d]."""
    rng = torch.Generator().manual_seed(1)
    if not isinstance(problem, Octopus):
        return [torch.randn(problem.d, generator=rng, dtype=torch.float64) for _ in range(n)]
    t, points = problem.tau, []
    for i in range(n):
        stage = i % (problem.d + 1)
        x = (torch.rand(problem.d, generator=rng, dtype=torch.float64) * 2 - 1) * t  # later legs within tau
        x[:stage] = torch.empty(stage, dtype=torch.float64).uniform_(2.1, 5.9, generator=rng) * t
        if stage < problem.d:
            x[stage] = x[stage].sign() * t * torch.empty((), dtype=torch.float64).uniform_(0.1, 1.9, generator=rng)
        points.append(x)
    return points


def hessian(problem: Problem, x: Tensor) -> Tensor:
    return torch.autograd.functional.hessian(problem, x)


@by_problem
def test_gradients(problem: Problem) -> None:
    """The closed form is autograd's gradient and central differences of f (error h^2 |f'''| + eps |f| / h)."""
    h = 1e-5
    for x in points_of(problem):
        y = x.clone().requires_grad_()
        (auto,) = torch.autograd.grad(problem(y), y)
        assert torch.allclose(problem.gradient(x), auto, rtol=1e-9, atol=1e-9)
        e = torch.eye(problem.d, dtype=torch.float64)
        differences = torch.stack([(problem(x + h * v) - problem(x - h * v)) / (2 * h) for v in e])
        assert torch.allclose(auto, differences, rtol=1e-6, atol=1e-6 * (1 + float(auto.abs().max())))


@by_problem
def test_critical_points(problem: Problem) -> None:
    points = problem.critical_points()
    assert points
    for point in points:
        assert problem.gradient(point.x).norm() < 1e-9
        eigenvalues = torch.linalg.eigvalsh(hessian(problem, point.x))
        assert float(eigenvalues[0]) == pytest.approx(point.lambda_min, abs=1e-8)
        assert int((eigenvalues < -1e-8).sum()) == point.index
    assert any(p.index for p in points) or isinstance(problem, problems.MonkeySaddle)


@by_problem
def test_constants(problem: Problem) -> None:
    """Gradient and Hessian never change faster than L and rho say, over pairs of points in the ball."""
    points = points_of(problem, 40)
    ball = max(float(x.square().sum()) for x in points)
    smooth, curved = problem.constants(ball)
    for x, y in pairwise(points):
        if isinstance(problem, Octopus):
            y = x + 1e-3 * problem.tau * torch.linspace(-1, 1, problem.d, dtype=torch.float64)
        distance = float((x - y).norm())
        assert float((problem.gradient(x) - problem.gradient(y)).norm()) <= smooth * distance * (1 + 1e-9)
        change = torch.linalg.matrix_norm(hessian(problem, x) - hessian(problem, y), ord=2)
        assert float(change) <= curved * distance * (1 + 1e-9)


def test_oracle_is_unbiased_with_its_variance() -> None:
    """Over 4,000 steps: mean within 5 standard errors, E||noise||^2 = sigma^2; workers' means average to grad f."""
    problem, x = problems.DoubleWells(6), torch.linspace(-1, 1, 6, dtype=torch.float64)
    for lipschitz in (True, False):
        oracle = Oracle(problem, sigma=0.7, lipschitz=lipschitz)
        draws = torch.stack([oracle.gradient(x, step=t) for t in range(4000)]) - problem.gradient(x)
        assert bool((draws.mean(0).abs() <= 5 * draws.std(0) / 4000**0.5).all())
        assert float(draws.square().sum(1).mean()) == pytest.approx(0.49, rel=0.05)
    half = Oracle(problem, sigma=0.7, quiet=2)
    draws = torch.stack([half.gradient(x, step=t) for t in range(4000)]) - problem.gradient(x)
    assert not draws[:, :2].any()
    assert float(draws.square().sum(1).mean()) == pytest.approx(0.49, rel=0.05)
    for workers in (1, 2, 5):
        shared = Oracle(problem, heterogeneity=3.0, workers=workers)
        each = [shared.gradient(x, step=0, worker=i) for i in range(workers)]
        assert torch.allclose(sum(each) / workers, problem.gradient(x), atol=1e-12)
        if workers > 1:
            assert float((each[0] - problem.gradient(x)).norm()) == pytest.approx(3.0)


def test_assumption_c_holds_or_fails_as_declared() -> None:
    """For the same theta, gradients at points 1e-3 apart differ by L times that, or by the size of the noise."""
    problem, x = problems.Cosine(4), torch.full((4,), 0.5, dtype=torch.float64)
    y = x + 1e-3 * math.pi * torch.eye(4, dtype=torch.float64)[0]
    smooth, rough = (Oracle(problem, sigma=1.0, lipschitz=flag) for flag in (True, False))
    for t in range(20):
        assert float((smooth.gradient(x, step=t) - smooth.gradient(y, step=t)).norm()) <= float((x - y).norm())
        assert float((rough.gradient(x, step=t) - rough.gradient(y, step=t)).norm()) > 100 * float((x - y).norm())
