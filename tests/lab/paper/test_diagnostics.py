"""The proof's ideas measured: against closed-form recursions, the naive twin, exact limits and textbook lemmas."""

import math

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from examples.reference import Check, algorithm1
from lab.paper.problems import (
    Cosine,
    DoubleWells,
    Oracle,
    Quadratic,
)
from lab.paper.proof import (
    Method,
    couple,
    coupling_std,
    error_growth,
    escape_times,
    growth_rate,
    predicted_escape_time,
    random_k_limit,
)
from packsaddle import RandomK, TopK
from packsaddle.feedback.noise import Noise

ETA, GAMMA, R = 0.05, 0.5, 1e-3
SADDLE = Quadratic((-GAMMA,) + (1.0,) * 19)
# The paper's example (section 3.1): all coordinates of the gradient are 1, so perturbations decide TopK's support.
ONES = Quadratic((-GAMMA,) + (0.0,) * 15, slopes=(1.0,) * 16)


def zeros(d: int) -> Tensor:
    return torch.zeros(d, dtype=torch.float64)


def draws(noise: float, d: int, steps: int, seed: int = 0) -> Tensor:
    """xi_t for t < steps, float64[steps, d]."""
    return torch.stack([Noise(noise).vector(zeros(d), seed=seed, step=t) for t in range(steps)])


def test_the_coupled_difference_obeys_its_linear_recursion() -> None:
    """Along any eigenvector, stochastic gradients included: 300 steps amplify 2e-18 of rounding by (1.025)^300."""
    problem, v = Quadratic((-GAMMA,) * 8), torch.linspace(-1, 2, 8, dtype=torch.float64)
    coupling = couple(Oracle(problem, sigma=0.3), Method(ETA, noise=R), zeros(8), steps=300, direction=5 * v, seed=3)
    v, delta = v / v.norm(), 0.0
    assert coupling.gamma == pytest.approx(GAMMA)
    for t, xi in enumerate(draws(R, 8, 300, seed=3)):
        delta = (1 + ETA * GAMMA) * delta - 2 * ETA * float(v @ xi)
        assert float(coupling.along[t + 1]) == pytest.approx(delta, abs=1e-10, rel=1e-10)
    assert torch.allclose(coupling.x_gap, coupling.along.abs(), atol=1e-12)
    assert float(coupling.e_gap.max()) == 0
    assert coupling.growth_rate(200) == pytest.approx(math.log1p(ETA * GAMMA), rel=0.02)


def test_the_second_run_is_algorithm_1_with_mirrored_noise() -> None:
    """y'_{t+1} = y'_t - eta (grad F(x'_t, theta_t) + xi'_t) for any compressor, to rounding."""
    oracle = Oracle(DoubleWells(6), sigma=0.2)
    coupling = couple(oracle, Method(ETA, TopK(k=2), 0.1), zeros(6) + 0.1, steps=50, seed=4)
    second, v = coupling.second, coupling.direction
    for t, xi in enumerate(draws(0.1, 6, 50, seed=4)):
        gradient = oracle.gradient(second.x[t], step=t)
        expected = second.y[t] - ETA * (gradient + xi - 2 * (v @ xi) * v)
        assert torch.allclose(second.y[t + 1], expected, atol=1e-14)
    assert torch.equal(second.x[0], coupling.first.x[0])
    assert torch.allclose(second.y, second.x - ETA * second.e, atol=1e-14)
    assert torch.equal(coupling.f_mirrored, second.objective())
    for name in ("x", "y", "e"):
        for t in range(51):
            gap = (getattr(coupling.first, name)[t] - getattr(second, name)[t]).norm()
            assert float(getattr(coupling, f"{name}_gap")[t]) == pytest.approx(float(gap), abs=1e-15)


def test_the_stated_std_is_that_of_the_recursion() -> None:
    q, steps = 1 + ETA * GAMMA, 400
    stated = coupling_std(steps, eta=ETA, gamma=GAMMA, noise=R)
    t = torch.arange(steps + 1, dtype=torch.float64)
    assert torch.allclose(stated, 2 * ETA * R * ((q ** (2 * t) - 1) / (q**2 - 1)).sqrt(), rtol=1e-12)
    # Jin's prefactor, up to eta gamma / 4.
    assert float(stated[-1]) == pytest.approx(2 * R * math.sqrt(ETA / (2 * GAMMA)) * q**steps, rel=ETA * GAMMA)
    only_first = coupling_std(3, eta=ETA, gamma=GAMMA, noise=lambda t: R * (t == 0))
    assert only_first.tolist() == pytest.approx([0, 2 * ETA * R, 2 * ETA * R * q, 2 * ETA * R * q**2])


@pytest.mark.slow
@pytest.mark.parametrize("c", [1e-6, 0.01, 3.0])
def test_the_rate_is_the_sum_over_gaps(c: float) -> None:
    """And where that has too many terms, the exponential distribution's: exp(b) E_1(b), b = mu / c."""
    for mu in (0.9, 0.1, 1e-3):
        gaps = np.arange(1, math.ceil(45 / mu))
        direct = mu * float(np.sum(mu * (1 - mu) ** (gaps - 1) * np.log1p(c * gaps)))
        assert growth_rate(c, 1.0, mu) == pytest.approx(direct, rel=1e-10)
    for mu in (1e-8, 1e-12):
        b = mu / c
        assert growth_rate(c, 1.0, mu) == pytest.approx(mu * math.exp(b) * scipy.special.exp1(b), rel=1e-6)


@pytest.mark.nightly
def test_random_k_grows_at_its_rate() -> None:
    """Uncompressed SGD grows by a half faster: log(1.1) = 0.095 a step, and not 0.063."""
    problem = Quadratic((-GAMMA,) + (0.2,) * 19)
    coupling = couple(Oracle(problem), Method(0.2, RandomK(k=2), R), zeros(20), steps=500)
    assert coupling.growth_rate(100) == pytest.approx(growth_rate(0.2, GAMMA, 2 / 20), rel=0.15)
    assert torch.equal(coupling.direction.abs(), torch.eye(20, dtype=torch.float64)[0])


def test_other_error_gaps_do_not() -> None:
    """Noise of 1e-7 and of 1e-3 part the errors alike, a thousand times what a linear compressor's would."""
    compressor = TopK(k=4)
    coupled = [
        couple(Oracle(ONES), Method(0.02, compressor, r), zeros(16), steps=60, direction=torch.eye(16)[0])
        for r in (1e-7, 1e-3)
    ]
    sizes = [float(run.e_gap.square().mean().sqrt()) for run in coupled]
    assert sizes[0] > 1
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    # Two steps in, coordinate 1 has been sent in one run or the other.
    assert float(coupled[0].e_gap[2]) > 1e3 * float(coupled[0].e_gap_bound(compressor.mu(16))[2].sqrt())


@pytest.mark.nightly
@pytest.mark.slow
def test_constant_gradients_meet_the_exact_error() -> None:
    """RandomK: E||e_t||^2 / ||g||^2 = E min(A, t)^2, A geometric, at every t; the bound tends to twice the limit."""
    mu, steps = 1 / 4, 50
    problem = Quadratic((0.0,) * 16, slopes=(1.0,) * 16)
    growth = error_growth(Oracle(problem), Method(0.1, RandomK(k=4)), zeros(16), steps=steps, seeds=30)
    assert random_k_limit(mu) == 21
    for t in range(1, steps + 1):
        exact = sum(a**2 * mu * (1 - mu) ** a for a in range(t)) + t**2 * (1 - mu) ** t
        assert float(growth.mean[t]) / 16 == pytest.approx(exact, abs=4 * float(growth.standard_error[t]) / 16 + 1e-9)
    se = float(growth.standard_error[-1])
    assert se < 0.15 * float(growth.mean[-1])
    assert abs(float(growth.mean[-1]) - 16 * random_k_limit(mu)) <= 3 * se
    assert float(growth.bound[-1]) / 16 == pytest.approx(2 * random_k_limit(mu), rel=2e-3)


def test_lemma_a5_holds_at_every_step() -> None:
    oracle, start, compressor = Oracle(Cosine(16), sigma=0.5), torch.full((16,), 2.0), TopK(k=4)
    growth = error_growth(oracle, Method(ETA, compressor, 0.1), start, steps=50, seeds=10)
    assert bool((growth.mean - 3 * growth.standard_error <= growth.bound).all())
    assert float(growth.mean[-1]) > 0
    too_good = error_growth(oracle, Method(ETA, compressor, 0.1), start, steps=5, seeds=10, mu=1.0)
    assert not bool((too_good.mean - 3 * too_good.standard_error <= too_good.bound).all())


@pytest.mark.slow
def test_escapes_take_the_predicted_time() -> None:
    """RandomK's own rate explains why it is slower than uncompressed SGD."""
    eta, r = 0.1, 1e-2
    measured = escape_times(Oracle(SADDLE), Method(eta, RandomK(k=2), r), zeros(20), radius=1.0, limit=700, seeds=12)
    predicted = predicted_escape_time(eta, GAMMA, r, 1.0)
    assert predicted == pytest.approx(126, abs=1)
    assert predicted < measured.median <= predicted * 1.5
    assert measured.improved == 12
    assert measured.quantile(0.1) < measured.median < measured.quantile(0.9)
    assert measured.median == pytest.approx(predicted_escape_time(eta, GAMMA, r, 1.0, mu=0.1), rel=0.1)


def test_escape_times_are_the_naive_twins() -> None:
    problem, start, compressor = DoubleWells(8), zeros(8), TopK(k=2)
    measured = escape_times(Oracle(problem), Method(ETA, compressor, 0.02), start, radius=0.5, limit=400, seeds=3)
    for seed, time in enumerate(measured.times.tolist()):
        options = {"eta": ETA, "steps": 401, "r": 0.02, "seed": seed}
        check = Check(lambda x: float(problem(x)), interval=400, radius=0.5)
        trace = algorithm1(start, [lambda x, t: problem.gradient(x)], compressor, **options, check=check)
        assert time == trace.resets[0][0]


WELL, START = Oracle(DoubleWells(3)), torch.zeros(3)
