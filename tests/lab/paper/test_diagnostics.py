"""The proof's ideas measured: against closed-form recursions, the naive twin, exact limits and textbook lemmas."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import scipy
import torch
from torch import Tensor

from lab.paper.problems import (
    Cosine,
    DoubleWells,
    Octopus,
    Oracle,
    Quadratic,
    QuadraticQuartic,
    RankOnePCA,
)
from lab.paper.proof import (
    Method,
    accumulate,
    couple,
    coupling_std,
    error_growth,
    escape_times,
    follow,
    growth_rate,
    improve_or_localise,
    negative_curvature,
    octopus_escapes,
    predicted_escape_time,
    random_k_limit,
    residual_gap,
)
from packsaddle import QSGD, AdaptiveTopK, Compressor, Identity, LinearSketch, RandomK, Sign, TopK
from packsaddle.feedback.noise import Noise
from packsaddle.reference import Check, algorithm1

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


def test_random_k_grows_at_its_rate() -> None:
    """One run's slope over 1,500 steps varies by some 1.5% (see experiments/diagnostics)."""
    coupling = couple(Oracle(SADDLE), Method(ETA, RandomK(k=5), R), zeros(20), steps=1700)
    assert coupling.growth_rate(200) == pytest.approx(growth_rate(ETA, GAMMA, 5 / 20), rel=0.03)
    assert torch.equal(coupling.direction.abs(), torch.eye(20, dtype=torch.float64)[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "compressor", [RandomK(k=4), LinearSketch(columns=4), LinearSketch(columns=4, sketch="gaussian")]
)
def test_linear_error_gaps_scale_with_the_perturbation(compressor: Compressor) -> None:
    """Twice the perturbation, twice e - e', at every step; and its mean square keeps to Lemma B.17's bound."""
    method, e1 = Method(0.02, compressor, 0.01), torch.eye(16)[0]
    once, half = (couple(Oracle(ONES), method, zeros(16), steps=60, direction=e1, scale=s) for s in (1, 0.5))
    assert torch.allclose(once.predicted_std, 2 * half.predicted_std)
    assert torch.allclose(once.noise_gap, 2 * half.noise_gap)
    moved = half.e_gap > 1e-6  # 0 when coordinate 1 has just been sent
    assert int(moved.sum()) > 20
    # Errors of size 10 in double precision, differences of size 0.01.
    assert torch.allclose(once.e_gap[moved] / half.e_gap[moved], torch.tensor(2.0, dtype=torch.float64), rtol=1e-9)
    runs = [couple(Oracle(ONES), method, zeros(16), steps=60, direction=e1, seed=s) for s in range(10)]
    measured = torch.stack([run.e_gap.square() for run in runs])
    bound = torch.stack([run.e_gap_bound(compressor.mu(16)) for run in runs]).mean(0)
    assert bool((measured.mean(0) - 3 * measured.std(0) / 10**0.5 <= bound).all())


@pytest.mark.parametrize("compressor", [TopK(k=4), AdaptiveTopK(0.25)])
def test_other_error_gaps_do_not(compressor: Compressor) -> None:
    """Noise of 1e-7 and of 1e-3 part the errors alike, a thousand times what a linear compressor's would."""
    coupled = [
        couple(Oracle(ONES), Method(0.02, compressor, r), zeros(16), steps=60, direction=torch.eye(16)[0])
        for r in (1e-7, 1e-3)
    ]
    sizes = [float(run.e_gap.square().mean().sqrt()) for run in coupled]
    assert sizes[0] > 1
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    # Two steps in, coordinate 1 has been sent in one run or the other.
    assert float(coupled[0].e_gap[2]) > 1e3 * float(coupled[0].e_gap_bound(compressor.mu(16))[2].sqrt())


def test_one_step_of_top_k_jumps() -> None:
    """Ones with changes of 1e-8: the support moves to four other coordinates, so e does by sqrt(8)."""
    first = torch.arange(16) < 4
    v, change = 1 + 1e-8 * first.double(), -2e-8 * first.double()
    assert residual_gap(TopK(k=4), v, change) == pytest.approx(math.sqrt(8), rel=1e-6)
    assert residual_gap(RandomK(k=4), v, change) <= float(change.norm()) * (1 + 1e-6)
    assert residual_gap(Identity(), v, change) == 0


def test_moving_without_noise_costs_what_it_must() -> None:
    """Gradient descent with eta <= 1/L: ||x_tau - x_0||^2 <= 2 eta tau (f(x_0) - f(x_tau)), so c <= 2."""
    problem = DoubleWells(5)
    run = follow(Oracle(problem), Method(0.1), torch.linspace(-0.1, 1, 5), steps=80)
    result = improve_or_localise(run, smoothness=2.0)
    assert 0.1 < result.constant <= 2
    assert bool((result.moved <= result.constant * result.bound * (1 + 1e-12)).all())
    assert not bool((result.moved <= 0.99 * result.constant * result.bound).all())
    uphill = follow(Oracle(Quadratic((3.0,))), Method(1.0), torch.ones(1), steps=4)
    assert improve_or_localise(uphill, smoothness=3.0).constant == math.inf


def test_without_error_feedback_it_is_plain_compressed_sgd() -> None:
    """x <- x - C(eta (grad + xi)), written out; what is not sent is lost."""
    problem, start = QuadraticQuartic(6), torch.linspace(-1, 1, 6, dtype=torch.float64)
    run = follow(Oracle(problem, sigma=0.1), Method(0.05, TopK(k=2), 0.02, error_feedback=False), start, steps=40)
    x, noise = start.clone(), Noise(0.02)
    for t in range(40):
        xi = noise.vector(x, seed=0, step=t)
        assert xi is not None
        x -= TopK(k=2)(0.05 * (run.gradients[t] + xi))
        assert torch.allclose(run.x[t + 1], x, rtol=0, atol=1e-12)
    assert not run.e.any()
    assert torch.equal(run.x, run.y)


def test_localisation_is_its_formula() -> None:
    problem, method = QuadraticQuartic(6), Method(0.05, RandomK(k=2), 0.02)
    run = follow(Oracle(problem, sigma=0.1), method, zeros(6), steps=50)
    result = improve_or_localise(run, smoothness=2.0, iota=3.0, begin=10, horizon=30)
    variance = 0.1**2 + 6 * 0.02**2
    for tau in range(31):
        gain = float(problem(run.x[10]) - problem(run.x[10 + tau]))
        stated = 0.05 * 30 * (gain + 0.05 * variance * (0.05 * 2.0 * 30 + 3.0))
        assert float(result.bound[tau]) == pytest.approx(stated, rel=1e-12)
        assert float(result.moved[tau]) == pytest.approx(float((run.y[10 + tau] - run.y[10]).norm()) ** 2, rel=1e-12)
    quiet = improve_or_localise(run, smoothness=2.0, noise_variance=0.0, begin=10, horizon=30)
    assert float(quiet.bound[30]) == pytest.approx(0.05 * 30 * float(problem(run.x[10]) - problem(run.x[40])))


def test_accumulate_is_the_sum_of_lemma_a5() -> None:
    energy, mu = torch.tensor([1.0, 0.5, 3.0, 0.1], dtype=torch.float64), 0.3
    for t, value in enumerate(accumulate(energy, mu).tolist()):
        terms = [(1 - mu / 2) ** (t - i) * float(energy[i]) for i in range(t)]
        assert value == pytest.approx(2 * (1 - mu) / mu * sum(terms))
    assert float(accumulate(energy, 1.0).max()) == 0


@pytest.mark.slow
def test_constant_gradients_meet_the_exact_error() -> None:
    """RandomK: E||e_t||^2 / ||g||^2 = E min(A, t)^2, A geometric, at every t; the bound tends to twice the limit."""
    mu, steps = 1 / 8, 120
    problem = Quadratic((0.0,) * 16, slopes=(1.0,) * 16)
    growth = error_growth(Oracle(problem), Method(0.1, RandomK(k=2)), zeros(16), steps=steps, seeds=30)
    assert random_k_limit(mu) == 105
    for t in range(1, steps + 1):
        exact = sum(a**2 * mu * (1 - mu) ** a for a in range(t)) + t**2 * (1 - mu) ** t
        assert float(growth.mean[t]) / 16 == pytest.approx(exact, abs=4 * float(growth.standard_error[t]) / 16 + 1e-9)
    se = float(growth.standard_error[-1])
    assert se < 0.1 * float(growth.mean[-1])
    assert abs(float(growth.mean[-1]) - 16 * random_k_limit(mu)) <= 3 * se
    assert float(growth.bound[-1]) / 16 == pytest.approx(2 * random_k_limit(mu), rel=1e-3)


@pytest.mark.parametrize(
    "compressor",
    [RandomK(k=4), TopK(k=4), Sign(), QSGD(levels=1), LinearSketch(columns=4)],
    ids=lambda c: type(c).__name__,
)
def test_lemma_a5_holds_at_every_step(compressor: Compressor) -> None:
    oracle, start = Oracle(Cosine(16), sigma=0.5), torch.full((16,), 2.0)
    growth = error_growth(oracle, Method(ETA, compressor, 0.1), start, steps=50, seeds=10)
    assert bool((growth.mean - 3 * growth.standard_error <= growth.bound).all())
    assert float(growth.mean[-1]) > 0
    too_good = error_growth(oracle, Method(ETA, compressor, 0.1), start, steps=5, seeds=10, mu=1.0)
    assert not bool((too_good.mean - 3 * too_good.standard_error <= too_good.bound).all())


@pytest.mark.slow
@pytest.mark.parametrize(("compressor", "slack"), [(Identity(), 1.1), (RandomK(k=2), 1.5), (TopK(k=2), 1.5)])
def test_escapes_take_the_predicted_time(compressor: Compressor, slack: float) -> None:
    eta, r = 0.1, 1e-2
    measured = escape_times(Oracle(SADDLE), Method(eta, compressor, r), zeros(20), radius=1.0, limit=700, seeds=12)
    predicted = predicted_escape_time(eta, GAMMA, r, 1.0)
    assert predicted == pytest.approx(126, abs=1)
    assert predicted / slack <= measured.median <= predicted * slack
    assert measured.improved == 12
    assert measured.quantile(0.1) < measured.median < measured.quantile(0.9)
    if isinstance(compressor, RandomK):  # its own rate explains the slowdown
        assert measured.median == pytest.approx(predicted_escape_time(eta, GAMMA, r, 1.0, mu=0.1), rel=0.1)


@pytest.mark.parametrize("compressor", [RandomK(k=3), TopK(k=2)])
def test_escape_times_are_the_naive_twins(compressor: Compressor) -> None:
    problem, start = DoubleWells(8), zeros(8)
    measured = escape_times(Oracle(problem), Method(ETA, compressor, 0.02), start, radius=0.5, limit=400, seeds=3)
    for seed, time in enumerate(measured.times.tolist()):
        options = {"eta": ETA, "steps": 401, "r": 0.02, "seed": seed}
        check = Check(lambda x: float(problem(x)), interval=400, radius=0.5)
        trace = algorithm1(start, [lambda x, t: problem.gradient(x)], compressor, **options, check=check)
        assert time == trace.resets[0][0]


def test_without_noise_a_saddle_is_for_ever() -> None:
    measured = escape_times(Oracle(SADDLE), Method(ETA), zeros(20), radius=1e-6, limit=200, seeds=2)
    assert measured.times.tolist() == [math.inf, math.inf]
    assert measured.median == math.inf
    assert measured.improved == 0


@pytest.mark.slow
@pytest.mark.parametrize("compressor", [Identity(), RandomK(k=2), TopK(k=1)])
def test_the_octopus_is_escaped_d_times(compressor: Compressor) -> None:
    problem = Octopus(4)
    run = follow(Oracle(problem), Method(0.04, compressor, 0.02), torch.full((4,), 1e-3), steps=750)
    times = octopus_escapes(problem, run.x)
    assert len(times) == 4
    later = [b - a for a, b in pairwise(times)]
    assert max(later) < 2 * min(later)  # every leg takes about as long as another


@pytest.mark.slow
def test_gradient_descent_pays_more_for_every_leg() -> None:
    """Without noise each leg takes some 3.7 = (L + gamma) / gamma times the one before (Du et al. 2017)."""
    problem = Octopus(3)
    run = follow(Oracle(problem), Method(0.04), torch.full((3,), 1e-3), steps=2700)
    first, second, third = octopus_escapes(problem, run.x)
    assert 3 < (second - first) / first < 5
    assert 3 < (third - second) / (second - first) < 5
    back = torch.stack([run.x[second], run.x[0], run.x[second]])
    assert octopus_escapes(problem, back) == [2, 2]
    with pytest.raises(ValueError, match="not defined"):
        octopus_escapes(problem, run.x + 30)


def test_the_direction_is_that_of_the_smallest_eigenvalue() -> None:
    problem = RankOnePCA((3.0, 2.0, 0.5))
    saddle = problem.critical_points()[2]  # +sqrt(2) e_2: lambda_min = -1 along e_1
    gamma, v = negative_curvature(problem, saddle.x)
    assert gamma == pytest.approx(-saddle.lambda_min)
    assert v.abs().tolist() == pytest.approx([1, 0, 0], abs=1e-12)


WELL, START = Oracle(DoubleWells(3)), torch.zeros(3)
RUN = follow(WELL, Method(ETA), START + 1, steps=3)
COUPLED = couple(WELL, Method(ETA), START, steps=3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: follow(WELL, Method(ETA), torch.zeros(2), steps=1), "start must have shape .3,., got .2,."),
        (lambda: follow(Oracle(WELL.problem, workers=2), Method(ETA), START, steps=1), "made for 2 workers, but 1 run"),
        (lambda: couple(WELL, Method(ETA), START, steps=3, direction=START), "direction must be a vector of 3"),
        (lambda: couple(WELL, Method(ETA), START + 1, steps=3), "must have a direction of negative curvature"),
        (lambda: COUPLED.growth_rate(3), "needs two or more differences, none 0, got 1 with 1 zeros"),
        (lambda: improve_or_localise(RUN, smoothness=2.0, begin=2, horizon=2), "must be at most 3 steps"),
        (lambda: accumulate(torch.ones(2), 0.0), r"mu must be in \(0, 1\], got 0.0"),
        (lambda: predicted_escape_time(0.1, -0.5, 0.1, 1.0), "gamma must be positive and finite, got -0.5"),
        (lambda: Quadratic((1.0, 2.0), slopes=(1.0,)), "needs a slope per curvature, got 1 for 2"),
    ],
)
def test_bad_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_global_randomness_is_left_alone() -> None:
    before = torch.get_rng_state()
    couple(Oracle(DoubleWells(3), sigma=0.1), Method(ETA, RandomK(k=1), 0.1), START, steps=3)
    assert torch.equal(torch.get_rng_state(), before)
