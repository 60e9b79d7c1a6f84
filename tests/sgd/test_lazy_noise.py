"""Noise drawn where it reaches x: the law of noise in the error memory, and its very run where the same is drawn."""

import copy
from typing import Any

import pytest
import torch
from problems import feed, lone, network, vector
from scipy.stats import kstest
from specs import folded
from torch import Tensor, nn

from packsaddle import QSGD, CompressedSGD, Compression, Escape, Identity, Ramp, RandomK, TopK, simulate
from packsaddle.compressors.sparse import Cells
from packsaddle.feedback.noise import GaussianNoise, Noise
from packsaddle.sgd.lazy_noise import OutstandingNoise

D = 8000
KEPT = RandomK(0.2)


def run(*, lazy: bool, steps: int, compressor: RandomK = KEPT, noise: Any = 1.0, seed: int = 1, d: int = D) -> Tensor:
    """x_t for all t, float64[steps + 1, d]: coordinates that do not see each other."""
    w = nn.Parameter(torch.full((d, 1), 0.5, dtype=torch.float64))
    opt = CompressedSGD([w], 0.1, Compression(compressor, dense_below=0), noise=Noise(noise, lazy), seed=seed)
    xs = [w.detach().flatten().clone()]
    for _ in range(steps):
        w.grad = 0.5 * w.detach() + 0.5 * torch.sin(5 * w.detach())  # not linear, so more than two moments matter
        opt.step()
        xs.append(w.detach().flatten().clone())
    return torch.stack(xs)


@pytest.mark.parametrize("noise", [0.3, Ramp(0.5, 4, 12, final=0.1)], ids=["constant", "ramp"])
@pytest.mark.parametrize("block", [1, 3])
def test_the_same_draws_give_the_same_run(noise: Any, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager noise that is what lazy noise drew, at the step and cells where it drew, and 0 elsewhere."""
    drawn: dict[int, Tensor] = {}
    take = OutstandingNoise.take

    def recorded(self: OutstandingNoise, cells: Cells, out: Tensor, *, seed: int, step: int) -> None:
        before = out.clone()
        take(self, cells, out, seed=seed, step=step)
        drawn[step] = torch.zeros(61, dtype=out.dtype)
        cells.add_to(drawn[step], out - before, 1 / 0.1)

    class Injected(GaussianNoise):
        def add_to(self, out: Tensor, alpha: float = 1.0, start: int = 0) -> None:
            out.add_(drawn[int(self.std)][start : start + len(out)], alpha=alpha)

    compressor = RandomK(0.3, block_size=block)
    monkeypatch.setattr(OutstandingNoise, "take", recorded)
    lazy = run(lazy=True, steps=25, compressor=compressor, noise=noise, d=61)
    monkeypatch.setattr(Noise, "drawn", lambda self, *, seed, step: Injected(step, (0, 0, 0)))  # type: ignore
    eager = run(lazy=False, steps=25, compressor=compressor, noise=noise, d=61)
    assert len(drawn) == 25
    assert torch.allclose(lazy, eager, rtol=1e-12, atol=1e-13)
    assert not torch.equal(lazy[5], lazy[0])


def test_variances_grow_until_a_cell_is_kept() -> None:
    outstanding, every = (
        OutstandingNoise(0.0, torch.zeros(10_000, dtype=torch.float64), 2),
        Cells(torch.arange(10_000), 2),
    )

    def take(cells: Cells, step: int) -> Tensor:
        out = torch.zeros(len(cells.index) * 2, dtype=torch.float64)
        outstanding.take(cells, out, seed=0, step=step)
        return out

    for std in (0.3, 0.4):
        outstanding.grow(std)
    take(Cells(torch.arange(5000), 2), 0)
    outstanding.grow(1.2)
    noise = take(every, 1)
    assert kstest(noise[:10_000].numpy() / 1.2, "norm").pvalue > 1e-3
    assert kstest(noise[10_000:].numpy() / 1.3, "norm").pvalue > 1e-3
    assert not take(every, 2).any()


def small(**changes: Any) -> tuple[nn.Module, Tensor, CompressedSGD]:
    model, data = network()
    arguments = {"compressor": RandomK(0.1), "noise": 0.1, "dense_below": 100, "seed": 3, **changes}
    return model, data, CompressedSGD(model.parameters(), 0.1, **folded(arguments))


def train(model: nn.Module, data: Tensor, opt: CompressedSGD, steps: int) -> None:
    for _ in range(steps):
        opt.zero_grad()
        (model(data) - data).square().mean().backward()
        opt.step()


def outstanding(opt: CompressedSGD) -> bool:
    return bool(opt.state_dict()["noise"])


def test_when_noise_is_lazy() -> None:
    escape = Escape(5, 1.0, lambda: 0.0)
    assert outstanding(small()[2])
    assert not outstanding(small(noise=0.0)[2])
    assert not outstanding(small(lazy=False)[2])
    assert not outstanding(small(escape=escape)[2])
    with pytest.raises(ValueError, match=r"lazy noise does not support an escape check.*draws noise eager"):
        small(escape=escape, lazy=True)
    for compressor in (TopK(0.1), Identity(), QSGD()):
        assert not outstanding(small(compressor=compressor)[2])
        with pytest.raises(ValueError, match="lazy noise needs RandomK by all-reduce, got"):
            small(compressor=compressor, lazy=True)


def test_dense_coordinates_get_the_noise_of_their_step() -> None:
    """Where all is dense but one tensor, that tensor alone is lazy: the rest moves exactly as with eager noise."""
    runs = []
    for lazy in (True, False):
        model, data, opt = small(lazy=lazy)
        train(model, data, opt, 1)
        runs.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(runs[0][i], runs[1][i]) for i in (1, 3))


def test_looking_does_not_change_the_run() -> None:
    (model, data, opt), (other, _, quiet) = small(), small()
    for _ in range(10):
        train(model, data, opt, 1)
        train(other, data, quiet, 1)
        assert torch.equal(opt.error(), opt.error())
        opt.corrected()
    assert torch.equal(vector(model), vector(other))


def test_what_is_looked_at_has_the_noise_in_it() -> None:
    """y_t - x_t has, over coordinates, the variance that eager noise would give it."""
    sizes = []
    for lazy in (True, False):
        w, opt = lone(torch.zeros(D, 1, dtype=torch.float64), 0.1, RandomK(0.01), noise=Noise(0.3, lazy))
        feed(w, opt, *[0.0] * 20)
        sizes.append(float(opt.error().std()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.05)


@pytest.mark.parametrize(
    "other",
    [{"lazy": False}, {"noise": 0.0}, {"compressor": RandomK(0.1, block_size=3)}, {"compressor": TopK(0.1)}],
    ids=str,
)
def test_noise_is_settled_where_a_state_goes_on_otherwise(other: dict[str, Any]) -> None:
    """Saved with outstanding noise, loaded where it cannot be: it is in the error memory then, in its size."""
    zeros = torch.zeros(D, 1, dtype=torch.float64)
    w, opt = lone(zeros, 0.1, RandomK(0.1), noise=0.3)
    feed(w, opt, *[0.0] * 8)
    _, loaded = lone(zeros, 0.1, **{"compressor": RandomK(0.1), "noise": 0.3, **other})
    loaded.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert float((loaded.state_dict()["noise"] or {"total": 0.0})["total"]) == 0
    assert float(loaded.error().std()) == pytest.approx(float(opt.error().std()), rel=0.05)
    assert float(opt.error().std()) > 0.5


@pytest.mark.parametrize(("dtype", "std"), [(torch.float64, 1e-6), (torch.float32, 10.0)])
def test_small_noise_after_much_is_not_lost(dtype: torch.dtype, std: float) -> None:
    """In the dtype of variances, which is float32 on MPS."""
    outstanding = OutstandingNoise(0.0, torch.zeros(5000, dtype=dtype), 2)
    every = Cells(torch.arange(5000), 2)
    for _ in range(100):
        outstanding.grow(1e4)
    outstanding.take(every, torch.zeros(10_000, dtype=torch.float64), seed=0, step=0)
    for _ in range(25):
        outstanding.grow(std)
    out = torch.zeros(10_000, dtype=torch.float64)
    outstanding.take(every, out, seed=0, step=1)
    assert kstest(out.numpy() / (5 * std), "norm").pvalue > 1e-3


def test_workers_stay_equal() -> None:
    def work(rank: int) -> Tensor:
        model, data, opt = small()
        train(model, data + rank, opt, 20)
        return vector(model)

    first, *others = simulate(work, 3)
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("change", ["frozen", "rates"])
def test_noise_goes_through_the_memory_where_cells_do_not_fit(change: str) -> None:
    """Frozen parameters stay, and rates that part settle what is outstanding; both then have eager noise's size."""
    w, v = (nn.Parameter(torch.zeros(4000, 1, dtype=torch.float64)) for _ in range(2))
    opt = CompressedSGD([{"params": [w]}, {"params": [v]}], 0.1, Compression(RandomK(0.1), dense_below=0), noise=0.3)
    before = v.detach().clone()
    for step in range(40):
        if step == 20:
            before = v.detach().clone()
            v.requires_grad_(change != "frozen")
            opt.param_groups[1]["lr"] = 0.1 if change == "frozen" else 0.2
        w.grad, v.grad = torch.zeros_like(w), torch.zeros_like(v)
        opt.step()
    # Kept every tenth step, so on average 31 of 40 steps' noise is in x, and 11 of 20 for the last half.
    assert float(w.detach().std()) == pytest.approx(0.1 * 0.3 * 31**0.5, rel=0.1)
    if change == "frozen":
        assert torch.equal(v, before)
    else:
        assert float((v.detach() - before).std()) == pytest.approx(0.1 * 0.3 * (4 * 11 + 9) ** 0.5, rel=0.1)
