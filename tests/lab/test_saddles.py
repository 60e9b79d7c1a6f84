"""The study of saddles by optimizer: its objective against autograd, its noise, its escapes, its search of rates."""

import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lab.saddles import escape, search
from lab.saddles.escape import Row, certify, follow, run
from lab.saddles.report import table
from lab.saddles.saddle import GAMMA, KINDS, Kind, Objective, Saddle
from lab.saddles.search import SEEDS, Rows, measure
from packsaddle import Verdict

PLAIN, RANK_ONE, QUIET, COORDINATES = KINDS


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Kind, "deviation", lambda self, n: 0.0)


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize(("kind", "rank"), [(PLAIN, 5), (RANK_ONE, 1)])
def test_gradients_and_spectrum_are_as_described(kind: str, rank: int) -> None:
    saddle = Saddle(5, kind, seed=3)
    v = saddle.direction()
    assert float(v.norm()) == pytest.approx(1.0)
    assert int(torch.linalg.matrix_rank(v)) == rank
    model = Objective(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))
    w = model.w.detach()
    s, value, gradient = saddle.gradients(0)(w)
    expected = model(v)
    expected.backward()
    assert (s, value) == (
        pytest.approx(float((v * w).sum())),
        pytest.approx(float(expected.detach()), rel=1e-5),
    )
    assert model.w.grad is not None
    assert torch.allclose(gradient, model.w.grad, atol=1e-5)

    def f(x: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"w": x.view(5, 5)}, (v,))

    eigenvalues = torch.linalg.eigvalsh(torch.autograd.functional.hessian(f, torch.zeros(25)))
    assert torch.allclose(eigenvalues, torch.tensor([-GAMMA] + 24 * [1.0]), atol=1e-5)


@pytest.mark.parametrize(("kind", "norm"), [(PLAIN, 1.0), (QUIET, 1.0), (COORDINATES, 5.0)])
def test_noise_has_its_norm_and_none_along_v_where_it_is_quiet(kind: str, norm: float) -> None:
    zero, saddle = torch.zeros(40, 40), Saddle(40, kind, seed=1)
    v = saddle.direction()
    for workers in (1, 4):
        gradient = saddle.gradients(0, workers)
        noises = [gradient(zero)[2] for _ in range(100)]
        squares = statistics.fmean(float(noise.square().sum()) for noise in noises)
        assert squares == pytest.approx(norm**2 / workers, rel=0.03)
        along = max(abs(float((v * noise).sum())) for noise in noises)
        assert along < 1e-6 if kind == QUIET else along > 0.01
    assert not torch.equal(saddle.gradients(0)(zero)[2], saddle.gradients(1)(zero)[2])


@pytest.mark.usefixtures("silent")
def test_gradient_descent_leaves_when_the_closed_form_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise s grows as s <- s + lr GAMMA (s - s^3), from wherever it begins."""
    saddle = Saddle(4, RANK_ONE, 0)
    monkeypatch.setattr(torch, "zeros", lambda *size: 1e-3 * saddle.direction())
    s, steps = 1e-3, 0
    while s < 0.5:
        s, steps = s + 0.5 * GAMMA * (s - s**3), steps + 1
    row = run("SGD", saddle, 0.5)
    assert abs(row.steps - steps) <= 1
    assert row.settled


def test_without_noise_along_v_gradient_descent_stays_and_adamw_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(escape, "LIMIT", 300)
    saddle = Saddle(4, QUIET, seed=0)
    assert run("SGD", saddle, 0.125).steps == 300
    assert run("AdamW", saddle, 0.0625).steps < 300


def test_a_rate_that_is_too_large_diverges() -> None:
    assert run("SGD", Saddle(4, PLAIN, 0), 3.0) == Row("SGD", PLAIN, 4, 3.0, 0, -1, False)


def test_start_and_end_are_certified() -> None:
    saddle = Saddle(4, PLAIN, 0)
    path = follow("SGD", saddle, 0.03125)
    assert path.settled
    assert path.mean is not None
    start, end = certify(torch.zeros(4, 4), saddle, 0.02), certify(path.mean, saddle, None)
    assert start.verdict == Verdict.SADDLE
    assert start.lambda_min_upper == pytest.approx(-GAMMA, abs=1e-3)
    assert end.lambda_min_lower > 0
    assert abs(float((saddle.direction() * path.mean).sum())) == pytest.approx(1.0, abs=0.3)


def rows_of(path: Path, largest: float, monkeypatch: pytest.MonkeyPatch) -> tuple[Rows, list[float]]:
    """Return rows whose runs settle up to the rate `largest`, which seed 3 halves, and the rates of the runs made."""
    made: list[float] = []

    def fake(method: str, saddle: Saddle, lr: float) -> Row:
        made.append(lr)
        settled = lr <= (largest / 2 if saddle.seed == 3 else largest)
        return Row(method, saddle.kind, saddle.n, lr, saddle.seed, 90 + saddle.seed, settled)

    monkeypatch.setattr(search, "run", fake)
    return Rows(path), made


def test_the_largest_rate_at_which_all_seeds_settle_is_found_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, made = rows_of(tmp_path / "rows.csv", 0.25, monkeypatch)
    measure(rows, ("SGD", PLAIN, 4))
    assert [row.lr for row in rows.best(("SGD", PLAIN, 4))] == [0.125] * len(SEEDS)
    again = Rows(tmp_path / "rows.csv")
    assert again.rows == rows.rows
    before = len(made)
    measure(again, ("SGD", PLAIN, 4))
    assert len(made) == before
    assert "| SGD | 92 (90 to 94) |" in table(again)


def test_a_search_begins_near_the_rate_of_the_smaller_dimension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, made = rows_of(tmp_path / "rows.csv", 0.25, monkeypatch)
    for n in (4, 16):
        made.clear()
        measure(rows, ("SGD", PLAIN, n))
    assert max(made) == 0.25
    assert rows.best(("SGD", PLAIN, 16))[0].lr == 0.125


def test_a_method_that_stays_is_not_tried_at_smaller_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def stays(method: str, saddle: Saddle, lr: float) -> Row:
        made.append(lr)
        return Row(method, saddle.kind, saddle.n, lr, saddle.seed, escape.LIMIT, False)

    monkeypatch.setattr(search, "run", stays)
    rows = Rows(tmp_path / "rows.csv")
    measure(rows, ("SGD", QUIET, 4))
    assert made == [0.125]
    assert "| SGD | never |" in table(rows)
