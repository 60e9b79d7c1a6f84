"""The mini-batches' noise against covariances that are known, and the walk of artificial noise against steps taken."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from packsaddle import CompressedSGD, Identity, Ramp, certify, gradient_noise, simulate, suggest_noise
from packsaddle.curvature.gradient_noise import GradientNoise
from packsaddle.curvature.mean_loss import NotFiniteError
from packsaddle.theory.noise_walk import GOOD, Walk, rms


class Shifted(nn.Module):
    """f = mean_i ||x - a_i||^2 / 2, so that an example's gradient is x - a_i, and tr(Cov) the variance of the a_i."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(d, dtype=torch.float64))
        self.unused = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(self, batch: Tensor) -> Tensor:
        return 0.5 * (self.x - batch).square().sum(1).mean()


def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch)
    return loss


def examples(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 + 1


def test_single_examples_give_numpys_variance() -> None:
    data = examples(40, 5)
    found = gradient_noise(Shifted(5), loss_fn, data.split(1))
    assert found.per_example == pytest.approx(np.var(data.numpy(), axis=0, ddof=1).sum(), rel=1e-12)
    assert (found.batches, found.batch_size, found.workers, found.d) == (40, 1.0, 1, 8)


def test_batches_of_unlike_sizes_estimate_without_bias() -> None:
    """tr(Cov) = 9 d; the mean of 300 estimates, each with its error, is within four of the mean's."""
    found = []
    for seed in range(300):
        data = examples(20, 4, seed)
        found.append(gradient_noise(Shifted(4), loss_fn, data.split([7, 3, 6, 4])))
    mean, spread = np.mean([f.per_example for f in found]), np.std([f.per_example for f in found])
    assert abs(mean - 36) < 4 * spread / math.sqrt(300)
    # The errors that were stated are those that were made, within a tenth: 300 samples of 3 independent terms.
    assert np.sqrt(np.mean([f.error**2 for f in found])) == pytest.approx(spread, rel=0.1)


def test_the_mean_over_workers_and_batches_is_quieter() -> None:
    one = GradientNoise(36.0, 3.6, 4.0, 8, 1, 9)
    nine = GradientNoise(36.0, 3.6, 4.0, 8, 9, 9)
    assert (one.std, nine.std, one.std_error) == (3.0, 1.0, pytest.approx(0.15))
    assert (one.times(0.5), nine.times(0.5)) == (0.5, 1.5)
    assert nine.times(nine.r(2.5)) == pytest.approx(2.5)
    quiet = GradientNoise(0.0, 0.0, 4.0, 8, 1, 9)
    assert (quiet.times(0.1), quiet.times(0.0), quiet.std_error) == (math.inf, 0.0, 0.0)


def test_workers_together_measure_what_each_has() -> None:
    data = [examples(12, 5, seed) for seed in range(3)]

    def worker(rank: int) -> GradientNoise:
        return gradient_noise(Shifted(5), loss_fn, data[rank].split(1))

    found = simulate(worker, 3)
    expected = np.mean([np.var(part.numpy(), axis=0, ddof=1).sum() for part in data])
    assert [f.per_example for f in found] == pytest.approx([expected] * 3, rel=1e-12)
    assert (found[0].workers, found[0].batches) == (3, 36)


@pytest.mark.parametrize("few", [0, 1])
def test_a_worker_with_too_few_batches_is_refused(few: int) -> None:
    """As many pairs as workers are not enough if others have them all."""
    data = examples(12, 5)
    with pytest.raises(ValueError, match="batches must be at least 2 on every worker"):
        simulate(lambda rank: gradient_noise(Shifted(5), loss_fn, data.split(1)[: 12 if rank == 0 else few]), 2)


def test_the_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 5))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    gradient_noise(model, lambda m, b: m(b).square().mean(), examples(40, 5).float().split(5))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_bad_arguments_are_named() -> None:
    batches, model = examples(8, 5).split(2), Shifted(5)
    imaginary = nn.ParameterDict({"z": torch.zeros(2, dtype=torch.complex64)})
    calls: dict[str, Callable[[], object]] = {
        "batches must be at least 2 on every worker": lambda: gradient_noise(model, loss_fn, batches[:1]),
        "workers must be at least 1, got 0": lambda: gradient_noise(model, loss_fn, batches, workers=0),
        "no trainable parameters": lambda: gradient_noise(nn.Identity(), loss_fn, batches),
        r"real parameters, but z is torch\.complex64": lambda: gradient_noise(imaginary, loss_fn, batches),
        r"have real parameters, but z is torch\.complex64": lambda: certify(imaginary, loss_fn, batches),
        r"lr must be positive and finite, got 0\.0": lambda: suggest_noise(model, lr=0.0, steps=10),
        "not all zero": lambda: suggest_noise(model, lr=1.0, steps=10),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(NotFiniteError):
        gradient_noise(model, loss_fn, [batch * math.inf for batch in batches])


@pytest.mark.parametrize("noise", [0.02, Ramp(0.02, 30, 70), Ramp(0.02, 0, 100, final=0.01)], ids=repr)
def test_x_walks_as_far_as_is_said(noise: float | Ramp) -> None:
    """On a flat objective; the length of a walk of 10,000 coordinates is its mean within 1 / sqrt(2 d), four times."""
    x = nn.Parameter(torch.ones(100, 100) * 0.5)
    steps = 100.0 if isinstance(noise, float) else noise.squares(100) / 0.02**2
    walk = Walk(0.3, steps, 0.5)
    opt = CompressedSGD([x], 0.3, compressor=Identity(), noise=noise)
    for _ in range(100):
        x.grad = torch.zeros_like(x)
        opt.step()
    moved = float((x.detach() - 0.5).double().square().mean().sqrt())
    assert moved / 0.5 == pytest.approx(walk.times(0.02), rel=4 / math.sqrt(2 * 10_000))


def test_the_suggestion_walks_as_far_as_is_stated() -> None:
    model = nn.Linear(30, 20)
    r = suggest_noise(model, lr=0.1, steps=400)
    assert 0.1 * r * math.sqrt(400) == pytest.approx(GOOD * rms(model))
    assert suggest_noise(model, lr=0.1, steps=400, times=1.0) == pytest.approx(r / GOOD)
