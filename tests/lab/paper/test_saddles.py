"""The study of saddles by optimizer: its objective against autograd, its noise, its fit on synthetic power laws."""

import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.saddles import run as study
from experiments.saddles.run import GAMMA, SIGMA, Row, Rows, Saddle, exponent


def objective(w: Tensor, v: Tensor) -> Tensor:
    s = (v * w).sum()
    return 0.5 * (w - s * v).square().sum() + GAMMA * (s**4 / 4 - s**2 / 2)


@pytest.mark.parametrize("rank_one", [True, False])
def test_gradients_and_spectrum_are_as_described(rank_one: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SIGMA", 0.0)
    saddle = Saddle(5, rank_one, quiet=False, seed=3)
    v = saddle.direction()
    assert float(v.norm()) == pytest.approx(1.0)
    assert int(torch.linalg.matrix_rank(v)) == (1 if rank_one else 5)
    w = torch.randn(5, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s, value, gradient = saddle.gradients(0)(w.detach())
    expected = objective(w, v)
    (derivative,) = torch.autograd.grad(expected, w)
    s_there = float((v * w.detach()).sum())
    assert (s, value) == (pytest.approx(s_there), pytest.approx(float(expected.detach()), rel=1e-5))
    assert torch.allclose(gradient, derivative, atol=1e-5)
    hessian = torch.autograd.functional.hessian(lambda x: objective(x.view(5, 5), v), torch.zeros(25))
    eigenvalues = torch.linalg.eigvalsh(hessian)
    assert torch.allclose(eigenvalues, torch.tensor([-GAMMA] + 24 * [1.0]), atol=1e-5)


def test_noise_has_its_norm_and_none_along_v_where_it_is_quiet() -> None:
    zero = torch.zeros(40, 40)
    for quiet in (False, True):
        saddle = Saddle(40, rank_one=False, quiet=quiet, seed=1)
        gradient, v = saddle.gradients(0), saddle.direction()
        noises = [gradient(zero)[2] for _ in range(200)]
        squares = statistics.fmean(float(noise.square().sum()) for noise in noises)
        assert squares == pytest.approx(SIGMA**2, rel=0.02)
        along = max(abs(float((v * noise).sum())) for noise in noises)
        assert along < 1e-6 if quiet else along > 0.02
    assert not torch.equal(saddle.gradients(0)(zero)[2], saddle.gradients(1)(zero)[2])


def test_gradient_descent_leaves_when_the_closed_form_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise s grows as s <- s + lr GAMMA (s - s^3), from wherever it begins."""
    monkeypatch.setattr(study, "SIGMA", 0.0)
    monkeypatch.setattr(torch, "zeros", lambda *size: 1e-3 * Saddle(size[0], True, False, 0).direction())
    s, steps = 1e-3, 0
    while s < 0.5:
        s, steps = s + 0.25 * GAMMA * (s - s**3), steps + 1
    row = study.run("SGD", Saddle(4, True, False, 0), 0.25)
    assert abs(row.steps - steps) <= 1
    assert row.settled


def test_where_only_nonlinearity_leads_out_sgd_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "LIMIT", 400)
    saddle = Saddle(4, rank_one=False, quiet=True, seed=0)
    assert study.run("SGD", saddle, 0.125).steps == 400
    assert study.run("AdamW", saddle, 0.0625).steps < 400


@pytest.mark.parametrize("b", [0.0, 0.5, 1.0])
def test_exponents_of_synthetic_power_laws(b: float) -> None:
    rng = np.random.default_rng(5)
    ds = [16.0, 256.0, 4096.0, 65536.0]
    times = [list(20 * d**b * np.exp(0.1 * rng.standard_normal(5))) for d in ds]
    found, low, high = exponent(ds, times)
    assert found == pytest.approx(b, abs=0.03)
    assert low <= b <= high
    assert high - low < 0.08


def test_rows_are_kept_and_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def fake(method: str, saddle: Saddle, lr: float) -> Row:
        made.append(lr)
        return Row(method, saddle.n, saddle.rank_one, saddle.quiet, lr, saddle.seed, -1 if lr > 0.2 else 90, lr < 0.2)

    monkeypatch.setattr(study, "run", fake)
    path = tmp_path / "rows.csv"
    first = Rows(path).measure("SGD", 4, True, False)
    assert [row.lr for row in first] == [0.125] * 5
    assert made == [1.0, 0.5, 0.25, *[0.125] * 5]
    again = Rows(path)
    assert again.measure("SGD", 4, True, False) == first
    assert len(made) == 8
    assert again.settled("SGD", 4, rank_one=True, quiet=False) == first
