"""CompressedSGD is Algorithm 1: against the reference on plain tensors, and its theory.

Its invariant, the recursion of y, is checked for every compressor and exchange in tests/comm/test_aggregators.py.
"""

from typing import Any

import families
import problems
import pytest
import torch
from torch import nn

import packsaddle as ps
from examples.reference import Check, algorithm1
from packsaddle.compressors.registry import CLASSES

COMPRESSORS: dict[str, ps.Compressor] = {
    "Identity": ps.Identity(),
    "RandomK": ps.RandomK(0.25),
    "RandomK blocks": ps.RandomK(0.5, block_size=2),
    "TopK": ps.TopK(k=3),
}
by_compressor = pytest.mark.parametrize("compressor", COMPRESSORS.values(), ids=COMPRESSORS.keys())
# Double precision; a hundred steps of a smooth, stable iteration multiply rounding errors by a few hundred.
TOLERANCE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}
ESCAPES: list[dict[str, Any]] = [{"interval": 7}, {"interval": 1000, "radius": 0.3}]


def gradients(workers: int) -> list[Any]:
    """Each worker's gradient, as the reference takes them."""
    return [lambda x, t, i=i: problems.gradient(i)(x) for i in range(workers)]


@by_compressor
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("escape", ESCAPES, ids=str)
def test_the_check_is_the_papers(compressor: ps.Compressor, workers: int, escape: dict[str, Any]) -> None:
    """The optimizer also checks x_T, as the reference does at the beginning of one more iteration."""
    steps = 50
    check = Check(lambda x: sum(float(problems.f_i(x, i)) for i in range(workers)) / workers, **escape)
    options: dict[str, Any] = {"eta": 0.05, "steps": steps + 1, "r": 0.02, "seed": 5, "check": check}
    twin = algorithm1(problems.start(), gradients(workers), compressor, **options)
    for ours in ps.simulate(lambda rank: problems.run(compressor, steps=steps, **escape), workers):
        assert ours["resets"] == twin.resets
        assert torch.allclose(ours["x"], torch.stack(twin.x[:-1]), **TOLERANCE)
        assert torch.allclose(ours["e"], torch.stack(twin.e[:-1]), **TOLERANCE)
    assert twin.resets


@pytest.mark.parametrize("workers", [1, 3])
def test_the_iterates_are_the_references(workers: int) -> None:
    """For all compressors except those that the reference's docstring names."""
    assert {type(compressor) for compressor in families.COMPRESSORS} == set(CLASSES.values())
    shapes = [torch.Size((2, 4)), torch.Size((4,))]  # of the parameters in `problems.run`
    for compressor in families.COMPRESSORS:
        if isinstance(compressor, ps.LowRank | ps.SharedTopK | ps.SketchTopK if workers > 1 else ps.LowRank):
            continue
        options: dict[str, Any] = {"eta": 0.05, "steps": 10, "r": 0.02, "seed": 5}
        twin = algorithm1(problems.start(), gradients(workers), compressor.for_tensors(shapes), **options)
        for ours in ps.simulate(lambda rank, c=compressor: problems.run(c, steps=10), workers):
            for name, theirs in (("x", twin.x), ("e", twin.e)):
                assert torch.allclose(ours[name], torch.stack(theirs), **TOLERANCE), (compressor, name)


def test_the_check_both_commits_and_rolls_back() -> None:
    """The comparison above would be idle if the twin never met both outcomes."""
    outcomes = set()
    for seed in range(5):
        outcomes |= {c for _, c in problems.run(ps.TopK(k=3), steps=100, noise=1.0, seed=seed, interval=7)["resets"]}
        if len(outcomes) == 2:
            break
    assert outcomes == {True, False}


def test_identity_is_sgd() -> None:
    """With no compression, noise or check, the trajectory is torch.optim.SGD's, weight decay and groups included."""
    rng = torch.Generator().manual_seed(1)
    start = [torch.randn(5, 4, generator=rng), torch.randn(4, generator=rng), torch.randn(40, 40, generator=rng)]

    def trajectory(make: Any) -> list[torch.Tensor]:
        weights = [nn.Parameter(s.clone()) for s in start]
        opt = make([{"params": weights[:2]}, {"params": weights[2:], "lr": 0.02, "weight_decay": 0.3}])
        for _ in range(10):
            opt.zero_grad()
            sum((p**3).sum() + p.sin().sum() for p in weights).backward()
            opt.step()
        return [p.detach() for p in weights]

    ours = trajectory(lambda groups: ps.CompressedSGD(groups, 0.01, compressor=ps.Identity(), weight_decay=0.1))
    torchs = trajectory(lambda groups: torch.optim.SGD(groups, 0.01, weight_decay=0.1))
    for a, b in zip(ours, torchs, strict=True):
        # Ten steps, each with a few single-precision roundings of numbers of order one.
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_error_reaches_its_theoretical_size() -> None:
    """Constant gradient g, fresh RandomK: E||e_t||^2 / ||g||^2 -> (1 - mu)(2 - mu) / mu^2, 105 for mu = 1/8."""
    mu, d = 1 / 8, 400
    w, opt = problems.lone(torch.zeros(d, 1, dtype=torch.float64), 1.0, ps.RandomK(mu))
    sizes = []
    for t in range(400):
        problems.feed(w, opt, 1.0)
        if t >= 100:
            sizes.append(float(opt.error().square().sum()) / d)
    # 300 correlated steps (over about 2/mu) of 400 coordinates: 1.5% standard error.
    assert sum(sizes) / len(sizes) == pytest.approx((1 - mu) * (2 - mu) / mu**2, rel=0.06)
