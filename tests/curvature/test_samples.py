"""A saddle is found on a sample of the examples and proved on all, against dense Hessians; limits, and Ctrl-C."""

import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from searches import Point, arguments, certified, dense_hessian
from torch import Tensor, nn

from packsaddle import Verdict, certify, simulate
from packsaddle.curvature import Progress
from packsaddle.curvature.search import size_of_sample

Batch = tuple[Tensor, Tensor]


def problem(seed: int, n: int = 640, *, relu: bool = False, dtype: torch.dtype = torch.float64) -> Any:
    """Return a network at a random point, its loss and data whose examples differ much."""
    rng = torch.Generator().manual_seed(seed)
    active = nn.ReLU() if relu else nn.Tanh()
    model = nn.Sequential(nn.Linear(5, 6), active, nn.Linear(6, 3)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=rng, dtype=torch.float64))
    data = torch.randn(n, 5, generator=rng, dtype=torch.float64)
    target = torch.randn(n, 3, generator=rng, dtype=torch.float64) + data[:, :3]
    return model, (data.to(dtype), target.to(dtype))


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def split(data: Batch, size: int) -> list[Batch]:
    return list(zip(*(part.split(size) for part in data), strict=True))


def along(model: nn.Module, data: Batch, v: Tensor) -> float:
    """Return v^T H v, in float64."""
    h = dense_hessian(model, loss_fn, data)
    return float(v @ h @ v)


@pytest.mark.parametrize("size", [16, 160], ids=["whole batches", "parts of batches"])
def test_a_sample_finds_and_all_examples_prove(size: int) -> None:
    model, data = problem(0)
    found = certified(model, loss_fn, split(data, size), epsilon=10.0)
    exact = along(model, data, found.escape_direction)
    assert found.verdict is Verdict.SADDLE
    assert found.sample_examples is not None
    assert 16 <= found.sample_examples <= 160
    assert found.lambda_min_upper == pytest.approx(exact, rel=1e-9)
    assert (found.lambda_min_lower, found.lambda_max_upper) == (-math.inf, math.inf)
    assert found.hvps == 1
    assert found.backward_passes < 12
    # Its losses along v, by hand.
    vector = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def loss_at(s: float) -> float:
        nn.utils.vector_to_parameters(vector + s * found.escape_direction, model.parameters())
        return float(loss_fn(model, data).detach())

    assert found.escape_loss == pytest.approx(loss_at(found.escape_distance), rel=1e-12)
    assert found.escape_loss < found.loss
    assert len(found.along_v) > 6
    text = str(found)
    assert text.startswith("This is a saddle: along v the curvature is at most -")
    assert f"v was found on {found.sample_examples} examples with {found.sample_hvps} products" in text
    assert "<svg" in found._repr_html_()
    assert "lambda_max" not in text


def opposed(rank: int = 0, workers: int = 1) -> list[Tensor]:
    """Of 40 batches those that the first and the second sample have are curved down along x_0, and the other 35 up."""
    signs = torch.ones(40, 16, 1, dtype=torch.float64)
    for stride in (40, 10):
        signs[stride // 2 :: stride] = -1.0
    return list(signs[rank::workers])


def curved(model: Any, batch: Tensor) -> Tensor:
    return (batch * model.x[0] ** 2 / 2).mean() + model.x[1:].square().sum() / 2


@pytest.mark.parametrize("seconds", [60.0, math.inf])
def test_what_only_a_sample_has_is_no_saddle(seconds: float) -> None:
    """The mean curvature along x_0 is (35 - 5) / 40."""
    found = certified(Point(torch.zeros(6, dtype=torch.float64)), curved, opposed(), epsilon=0.1, seconds=seconds)
    assert found.verdict is Verdict.SECOND_ORDER_STATIONARY
    assert found.sample_examples is None
    assert found.lambda_min_lower <= 0.75 <= found.lambda_min_upper + 1e-9


def test_samples_of_workers_are_searched_together() -> None:
    """One worker of three has no batches; the verdict and the direction are the same on all."""
    model, data = problem(1)
    batches = split(data, 16)

    def work(rank: int) -> Any:
        own, _ = problem(1)
        return certified(own, loss_fn, batches[rank::2] if rank < 2 else [], epsilon=10.0)

    found = simulate(work, 3)
    for one in found:
        assert one.verdict is Verdict.SADDLE
        assert torch.equal(one.escape_direction, found[0].escape_direction)
        assert one.sample_examples == found[0].sample_examples < 640
        assert one.lambda_min_upper == pytest.approx(along(model, data, one.escape_direction), rel=1e-9)


def test_batches_that_cannot_be_cut_are_searched_whole() -> None:
    model, data = problem(2)

    def whole(m: nn.Module, batch: Batch) -> Tensor:
        if len(batch[0]) != 320:
            raise RuntimeError("of 320 examples")
        return loss_fn(m, batch)

    found = certified(model, whole, split(data, 320), epsilon=10.0)
    assert (found.verdict, found.sample_examples) == (Verdict.SADDLE, None)
    assert found.lambda_min_lower > -math.inf


def test_a_finite_tolerance_or_no_sample_asks_for_all_bounds() -> None:
    model, data = problem(0)
    least = float(torch.linalg.eigvalsh(dense_hessian(model, loss_fn, data))[0])
    for options in ({"sample": False}, {"tolerance": 0.01}):
        found = certified(model, loss_fn, split(data, 16), epsilon=10.0, **options)
        assert (found.verdict, found.sample_examples) == (Verdict.SADDLE, None)
        assert found.lambda_min_lower <= least <= found.lambda_min_upper


@pytest.mark.parametrize(
    ("examples", "error", "norm", "size"),
    [
        (60_000, 1.0, 1e-9, 1875),  # noise above the gradient: N / 32
        (60_000, 1e-9, 1.0, 234),  # none: N / 256
        (60_000, 0.1, 1.0, 600),  # N (error / norm)^2
        (64, 1.0, 1.0, 16),
        (64, 1.0, 0.0, 16),
    ],
)
def test_the_size_of_a_sample_follows_from_the_noise(examples: int, error: float, norm: float, size: int) -> None:
    assert size_of_sample(examples, error, norm) == size


SEEDS = [*range(20), *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(20, 1000))]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_proof_is_false(seed: int) -> None:
    """Products in float32 by both methods, and networks with kinks by double backward: the upper bound is never below
    the exact curvature along v in float64, and so never below the smallest eigenvalue."""
    relu, hvp = seed % 3 == 0, ("differences" if seed % 3 == 1 else "double-backward")
    model, data = problem(seed, 128, relu=relu, dtype=torch.float32)
    found = certified(model, loss_fn, split(data, 8), epsilon=10.0, hvp=hvp, seed=seed)
    exact = along(model, data, found.escape_direction)
    assert found.lambda_min_upper >= exact
    assert found.lambda_min_upper <= exact + 0.02 + 2 * found.hvp_error
    if found.verdict is Verdict.SADDLE:
        assert exact < found.threshold


# ---- limits


class Clock:
    """A clock on which every look takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


def convex(model: Any, batch: Tensor) -> Tensor:
    """Without negative curvature, which takes some products to see."""
    return (torch.linspace(0.01, 2, 60, dtype=torch.float64) * (model.x - batch).square()).sum(-1).mean() / 2


def bowl(n: int = 640) -> tuple[Point, list[Tensor]]:
    rng = torch.Generator().manual_seed(0)
    return Point(torch.zeros(60, dtype=torch.float64)), list(
        torch.randn(n, 60, generator=rng, dtype=torch.float64).split(16)
    )


def test_bounds_that_take_too_long_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample's search tells how long they take; with more time they are computed."""
    monkeypatch.setattr("packsaddle.curvature.progress.time", Clock())
    settings = {"epsilon": 1e3, "hessian_lipschitz": 1e-9}
    found = certified(*bowl_and_loss(), **settings, seconds=100.0)
    assert found.verdict is Verdict.UNDECIDED
    assert found.postponed is not None
    assert found.postponed > 100
    assert found.hvps == 0
    assert found.escape_direction is None
    text = str(found)
    assert text.startswith("This is undecided: nothing was found")
    assert f"would take about {found.postponed:.0f} s, so they need search=Search(seconds=...) of as much" in text
    found = certified(*bowl_and_loss(), **settings, seconds=math.inf)
    assert (found.verdict, found.postponed) == (Verdict.SECOND_ORDER_STATIONARY, None)


def bowl_and_loss() -> tuple[Point, Callable[..., Tensor], list[Tensor]]:
    model, batches = bowl()
    return model, convex, batches


def test_bounds_end_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On all workers after the same product, with valid bounds."""
    monkeypatch.setattr("packsaddle.curvature.progress.time", Clock())

    def work(rank: int) -> Any:
        model, batches = bowl()
        options = {"hessian_lipschitz": 1e-9, "seconds": 400.0, "sample": False}
        return certified(model, convex, batches[rank::2], epsilon=1e3, **options)

    first, second = simulate(work, 2)
    assert first.stopped
    assert 1 <= first.hvps == second.hvps < 30
    assert first.lambda_min_lower == second.lambda_min_lower <= 0.01 <= first.lambda_min_upper + 1e-9
    assert first.verdict is Verdict.UNDECIDED
    assert "the search was stopped; more time may settle it" in str(first)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """As in a script, where Ctrl-C has Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(at: str, at_report: int, times: int = 1, **options: Any) -> Any:
    """Certify a bowl, and press Ctrl-C in this report of a phase."""
    reports, model = 0, bowl()[0]

    def press(progress: Progress) -> None:
        nonlocal reports
        reports += progress.phase.startswith(at)
        if progress.phase.startswith(at) and reports == at_report:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    settings = arguments(epsilon=1e3, hessian_lipschitz=1e-9, seed=0, **options)
    try:
        return certify(model, convex, bowl()[1], **settings, progress=press)
    finally:
        assert not model.x.detach().any()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_returns_what_is_known() -> None:
    found = interrupted("bounds", 800, sample=False)
    assert found.stopped
    assert found.lambda_min_lower <= 0.01 <= found.lambda_min_upper + 1e-9
    assert found.lambda_max_lower - 1e-9 <= 2 <= found.lambda_max_upper
    assert found.verdict is Verdict.UNDECIDED
    found = interrupted("search on", 4)
    assert found.stopped
    assert found.lambda_min_lower == -math.inf
    assert str(found).startswith("This is undecided: the search was stopped before it found anything")


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize(("at", "times"), [("loss", 1), ("bounds", 2)])
def test_ctrl_c_before_the_gradient_or_twice_is_an_interrupt(at: str, times: int) -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted(at, 60, times, sample=False)


# ---- points


def test_a_function_of_a_tensor_is_certified_at_a_point() -> None:
    """Two atoms in a double well each: at the top of both, the smallest curvature is -4 and the point is restored."""

    def energy(x: Tensor) -> Tensor:
        return ((x**2 - 1) ** 2).sum()

    x = torch.zeros(2, 1, requires_grad=True)
    found = certify(x, energy, progress=False)
    assert found.verdict is Verdict.NOT_A_MINIMUM
    assert found.lambda_min_upper == pytest.approx(-4, abs=1e-3)
    assert found.escape_loss < 2
    assert not x.detach().any()
    minimum = certify(torch.ones(2, 1, dtype=torch.float64), energy, progress=False)
    assert minimum.verdict is Verdict.NO_NEGATIVE_CURVATURE
    with pytest.raises(TypeError, match="batches must be given for a model"):
        certify(nn.Linear(2, 2), loss_fn)
    with pytest.raises(TypeError, match="batches must be None for a point"):
        certify(x, energy, [x])


def test_always_searches_where_the_gradient_is_too_large() -> None:
    model, data = problem(0)
    found = certified(model, loss_fn, split(data, 16), epsilon=1e-6, always=True)
    assert found.verdict is Verdict.GRADIENT_TOO_LARGE
    assert found.lambda_min_upper == pytest.approx(along(model, data, found.escape_direction), rel=1e-9)
    assert found.lambda_min_upper < 0
    assert "lambda_min is at most -" in str(found)


def test_lines_of_progress_begin_after_a_second(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("packsaddle.curvature.progress.time", Clock())
    model, data = problem(0)
    certify(model, loss_fn, split(data, 16), **arguments(epsilon=10.0, seed=0))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("certify: loss and gradient")
    assert any("search on 16 of 640 examples" in line and "s left" in line for line in lines)
    assert len(lines) < 60
    certify(model, loss_fn, split(data, 16), **arguments(epsilon=10.0, seed=0), progress=False)
    assert capsys.readouterr().err == ""
