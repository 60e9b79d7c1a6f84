"""Runs of networks from saddles: the symmetry and its projection, kernels as matrices, times, the search of rates."""

import csv
import math
from dataclasses import asdict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import packsaddle
from lab.bench.rate_search import climb
from lab.runs import ModelConfig
from lab.runs.tasks import make_task
from lab.saddles import network_runs
from lab.saddles.methods import METHODS, NETWORK_METHODS
from lab.saddles.network_report import table
from lab.saddles.network_runs import Point, Row, Rows, Run, draw_batch, gradient, measure, steps_to_leave
from lab.saddles.plateau import Matrices
from lab.saddles.symmetric import COPIES, HEADS, UNITS, WIDTH, Across, Symmetric, distance, project
from packsaddle.comm.select_aggregator import Exchange


@cache
def network() -> Symmetric:
    return Symmetric()


def train(task: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int) -> None:
    for step in range(steps):
        gradient(network(), task, draw_batch(len(network().data), 2, 0, step))
        for optimizer in optimizers:
            optimizer.step()


def heads_of(p: Tensor) -> list[Tensor]:
    """Return the query, key and value rows of each head of `inwards.weight`, float[3 width, width]."""
    size = WIDTH // HEADS
    return [torch.cat([p[i * WIDTH + h * size : i * WIDTH + (h + 1) * size] for i in range(3)]) for h in range(HEADS)]


def test_copies_have_equal_gradients() -> None:
    task = network().symmetric(0).double()
    assert distance(task) == 0.0
    gradient(network(), task, torch.arange(3))
    for name, p in task.named_parameters():
        assert p.grad is not None
        if name.endswith("inwards.weight"):
            first, *others = heads_of(p.grad)
            assert all(torch.allclose(other, first, rtol=1e-10, atol=1e-15) for other in others)
            assert float(first.norm()) > 1e-4
        if name.endswith("mlp.2.weight"):
            assert torch.allclose(p.grad, p.grad[:, :1].expand_as(p.grad), rtol=1e-10, atol=1e-15)


def test_projection_and_distance_are_those_of_a_naive_mean() -> None:
    task = network().usual(1)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    expected = distance(task)
    project(task)
    assert distance(task) < 1e-7
    moved = whole = 0.0
    for name, p in task.named_parameters():
        if name.endswith("inwards.weight"):
            mean = sum(heads_of(before[name]), torch.zeros(3 * WIDTH // HEADS, WIDTH)) / HEADS
            assert all(torch.allclose(head, mean, atol=1e-6) for head in heads_of(p.detach()))
        if name.endswith("mlp.0.weight"):
            rows = [before[name][unit] for unit in range(UNITS)]
            assert torch.allclose(p.detach(), torch.stack(rows).mean(0).expand_as(p), atol=1e-6)
        if name.endswith(tuple(COPIES)):
            moved += float((p.detach() - before[name]).square().sum())
            whole += float(before[name].square().sum())
        else:
            assert torch.equal(p, before[name])
    assert expected == pytest.approx(math.sqrt(moved / whole), rel=1e-5)


def test_gradient_descent_in_float64_stays_in_the_subspace_and_random_k_leaves_it() -> None:
    task = network().symmetric(0).double()
    train(task, [torch.optim.SGD(task.parameters(), 0.5)], 8)
    assert distance(task) < 1e-12
    task = network().symmetric(0)
    train(task, METHODS["RandomK 1/16"].make(list(task.parameters()), [], 0.5), 1)
    assert distance(task) > 1e-5


@pytest.mark.parametrize(("exchange", "stays"), [("direct", True), ("two-way", False)])
def test_sign_by_owners_leaves_the_subspace_since_each_owner_has_its_own_scale(
    exchange: Exchange, stays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def settings(compressor: packsaddle.Compressor) -> packsaddle.Compression:
        return packsaddle.Compression(compressor, exchange=exchange, dense_below=0)

    class Short(Symmetric):
        steps = 8

        def make(self, start: str, seed: int) -> nn.Module:
            return self.symmetric(seed)

    monkeypatch.setattr(network_runs, "local_settings", settings)
    run = network_runs.follow(Short(), "AdamW, 4 workers, local updates, Sign", "saddle", 2.0**-7, 0)
    assert [point.step for point in run.points] == [0, 8]
    assert run.points[0].distance == 0.0
    assert run.points[1].distance < 1e-7 if stays else run.points[1].distance > 1e-4


def test_across_is_the_loss_of_the_deviations_and_its_saddle_is_certified() -> None:
    task = network().symmetric(0)
    batch = network().data.batch(torch.arange(16), torch.device("cpu"))
    across = Across(task)
    assert torch.allclose(across(*batch), task(*batch), rtol=1e-6)
    certificate = packsaddle.certify(across, lambda m, b: m(*b), [batch], epsilon=1e-6, hessian_lipschitz=1.0)
    assert certificate.verdict == packsaddle.Verdict.SADDLE
    assert certificate.grad_norm < 1e-7

    # The network with these deviations, less their mean, has the same loss.
    rng = torch.Generator().manual_seed(0)
    expected = network().symmetric(0)
    with torch.no_grad():
        for name, p in expected.named_parameters():
            if name.endswith(tuple(COPIES)):
                z = across.deviations[name.replace(".", "_")]
                z.copy_(0.01 * torch.randn(z.shape, generator=rng))
                p.add_(z)
        moved = {name: p.clone() for name, p in expected.named_parameters()}
        project(expected)
        for name, p in expected.named_parameters():
            mean_of_moved, mean_at_first = p.clone(), dict(task.named_parameters())[name]
            p.copy_(moved[name] - mean_of_moved + mean_at_first)
    assert torch.allclose(across(*batch), expected(*batch), rtol=2e-6)
    assert not torch.allclose(across(*batch), task(*batch), rtol=2e-6)


def test_kernels_are_trained_as_matrices() -> None:
    task = make_task(ModelConfig("mnist-autoencoder"), torch.Size((1, 28, 28)), 10, 0)
    images = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0)), torch.zeros(4)
    matrices = Matrices(task)
    assert sorted({p.ndim for p in matrices.parameters()}) == [1, 2]
    losses = matrices(*images), task(*images)
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    grads = [torch.cat([p.grad.flatten() for p in m.parameters() if p.grad is not None]) for m in (matrices, task)]
    assert sorted(grads[0].tolist()) == pytest.approx(sorted(grads[1].tolist()))


def test_muon_trains_the_matrices_and_adamw_the_rest() -> None:
    matrix, vector = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))
    muon, adamw = NETWORK_METHODS["Muon"].make([matrix], [vector], 0.1)
    assert isinstance(muon, torch.optim.Muon)
    assert isinstance(adamw, torch.optim.AdamW)
    assert muon.param_groups[0]["params"][0] is matrix
    assert adamw.param_groups[0]["params"][0] is vector


def test_the_time_out_of_a_plateau_is_the_first_step_below_the_bound() -> None:
    points = [Point(8 * i, loss, 0.0) for i, loss in enumerate((0.5, 0.1, 0.095, 0.0931, 0.08, 0.09, 0.01))]
    assert steps_to_leave(points, lambda point: point.loss < 0.9 * 0.093) == 32
    assert steps_to_leave(points[:4], lambda point: point.loss < 0.9 * 0.093) is None


@pytest.mark.parametrize("best", [-9, -2, 3])
def test_a_search_ends_between_two_worse_rates(best: int) -> None:
    tried: dict[int, float] = {}

    def loss(exponent: int) -> float:
        return tried.setdefault(exponent, math.inf if exponent > best + 2 else abs(exponent - best))

    assert climb(lambda i: (loss(i), i), -3, network_runs.EXPONENTS) == best
    assert {best - 1, best, best + 1} <= set(tried)


def test_runs_are_kept_and_the_table_shows_those_at_the_best_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, float, int]] = []

    def fake(network: Symmetric, name: str, start: str, lr: float, seed: int) -> Run:
        made.append((start, lr, seed))
        if start == "saddle":
            return Run([Point(0, 2.0, 0.0), Point(network.steps, 2.0, 0.0)], None, {})
        if lr > 0.5:
            return Run([Point(0, 2.0, 0.0)])
        return Run([Point(80 + 8 * seed, 1.9, 0.2), Point(network.steps, 1.5 - lr, 0.5)], {}, {})

    monkeypatch.setattr(network_runs, "follow", fake)
    rows = Rows(network(), tmp_path / "symmetric.csv")
    measure(rows, ["TopK 1/16"])
    assert rows.best("TopK 1/16") == 0.5
    assert "| TopK 1/16 |  |  |  | 2^-1 | 88 (80 to 96) | 1 | never |" in table(tmp_path)
    assert ("usual", 0.5, 0) not in made

    # A second call repeats nothing, and the file has every run.
    again, before = Rows(network(), tmp_path / "symmetric.csv"), len(made)
    measure(again, ["TopK 1/16"])
    assert len(made) == before
    with (tmp_path / "symmetric.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [{key: line[key] for key in asdict(again.rows[0])} for line in lines] == [
        {key: str(value) for key, value in asdict(row).items()} for row in again.rows
    ]


def test_a_diverged_run_is_never_the_best() -> None:
    rows = [Row("SGD", "saddle", lr, 0, 9, True, loss, 0.0) for lr, loss in ((1.0, math.inf), (0.5, 0.3), (0.25, 0.4))]
    assert network_runs.best_rate(rows, "SGD", "saddle") == 0.5
    assert network_runs.best_rate(rows, "Muon", "saddle") is None
