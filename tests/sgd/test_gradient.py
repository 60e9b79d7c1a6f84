"""Momentum in CompressedSGD: beside torch's SGD, and beside uncompressed momentum."""

from typing import Any

import problems
import pytest
import torch
from specs import folded
from torch import Tensor, nn

from packsaddle import CompressedSGD, Compressor, Escape, Identity, RandomK, TopK, simulate
from packsaddle.comm.group import resolve
from packsaddle.feedback.noise import Noise

WORKERS, STEPS, LR, SEED, R = 3, 30, 0.03, 5, 0.05
COMPRESSORS: dict[str, Compressor] = {"TopK": TopK(k=3), "RandomK": RandomK(0.25)}


class Run:
    """A worker on the toy problem: x as two parameters."""

    def __init__(self, **options: Any) -> None:
        self.rank = resolve(None).rank
        start = problems.start()
        self.weights = [nn.Parameter(start[:8].reshape(2, 4).clone()), nn.Parameter(start[8:].clone())]
        given: dict[str, Any] = {"lr": LR, "noise": R, "lazy": False, "seed": SEED, "dense_below": 0}
        self.opt = CompressedSGD(self.weights, **folded(given | options))

    @property
    def x(self) -> Tensor:
        return torch.cat([w.detach().reshape(-1) for w in self.weights])

    def step(self) -> None:
        g = problems.gradient(self.rank)(self.x)
        self.weights[0].grad, self.weights[1].grad = g[:8].reshape(2, 4).clone(), g[8:].clone()
        self.opt.step()

    def trace(self, steps: int = STEPS) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = {"x": [self.x], "y": [self.opt.corrected()]}
        for _ in range(steps):
            self.step()
            seen["x"].append(self.x)
            seen["y"].append(self.opt.corrected())
        return seen


def xi(t: int, r: float = R) -> Tensor:
    drawn = Noise(r).vector(torch.zeros(problems.D, dtype=torch.float64), seed=SEED, step=t)
    assert drawn is not None
    return drawn


def same(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_compression_momentum_is_torchs(nesterov: bool, weight_decay: float) -> None:
    run = Run(noise=0.0, compressor=Identity(), momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    twin = nn.Parameter(problems.start().clone())
    sgd = torch.optim.SGD([twin], LR, momentum=0.9, nesterov=nesterov, weight_decay=weight_decay)
    for _ in range(STEPS):
        run.step()
        twin.grad = problems.gradient(0)(twin.detach())
        sgd.step()
        assert same(run.x, twin.detach())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_y_moves_as_in_sgd_with_momentum(name: str, nesterov: bool) -> None:
    """With the gradients taken at the compressed run's x, y is what uncompressed momentum makes of their mean."""
    traces = simulate(lambda rank: Run(compressor=COMPRESSORS[name], momentum=0.8, nesterov=nesterov).trace(), WORKERS)
    xs, ys = traces[0]["x"], traces[0]["y"]
    assert not same(xs[-1], ys[-1])
    y, m = ys[0], torch.zeros(problems.D, dtype=torch.float64)
    for t in range(STEPS):
        u = sum(problems.gradient(w)(xs[t]) for w in range(WORKERS)) / WORKERS + xi(t)
        m = 0.8 * m + u
        y = y - LR * (0.8 * m + u if nesterov else m)
        assert same(ys[t + 1], y)


def test_momentum_is_forgotten_with_a_rolled_back_segment() -> None:
    rule = Escape(5, 1e9, lambda: 0.0)  # never better: every segment is rolled back
    run = Run(noise=0.0, compressor=Identity(), momentum=0.9, escape=rule)
    run.trace(6)
    first = run.opt.resets[0]
    assert not first.committed
    assert same(run.x, problems.start())
    run.step()
    assert same(run.x, problems.start() - LR * problems.gradient(0)(problems.start()))


def test_weights_that_are_loaded_later_stay() -> None:
    run = Run(compressor=TopK(k=1), lr=0.0)
    with torch.no_grad():
        for w in run.weights:
            w.add_(1.0)
    for _ in range(4):
        run.step()
    assert same(run.x, problems.start() + 1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.1}, "momentum must be in"),
        ({"nesterov": True}, "nesterov needs a momentum above 0"),
        ({"momentum": 0.5, "lazy": True, "noise": 0.1}, "lazy noise does not support momentum"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**({"compressor": RandomK(0.25)} | options))


def test_a_state_without_momentum_is_refused() -> None:
    state = Run(compressor=TopK(k=2), momentum=0.5).opt.state_dict()
    with pytest.raises(ValueError, match="direction is gradient here, but the state was saved with direction momentum"):
        Run(compressor=TopK(k=2)).opt.load_state_dict(state)
