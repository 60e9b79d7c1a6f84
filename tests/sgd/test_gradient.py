"""Momentum and EF21 in CompressedSGD: naive twins from the papers, torch's SGD, known problems."""

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


# ---- momentum


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


# ---- EF21


def ef21_twin(compressor: Compressor, beta: float, steps: int) -> list[Tensor]:
    """Richtarik et al. 2021, Algorithm 2, and with beta Fatkhullin et al. 2023's EF21-SGDM, from zero estimates."""
    x = problems.start()
    g = [torch.zeros_like(x) for _ in range(WORKERS)]
    v: list[Tensor] = []
    xs = [x]
    for t in range(steps):
        u = [problems.gradient(w)(x) + xi(t) for w in range(WORKERS)]
        v = [beta * old + (1 - beta) * new for old, new in zip(v, u, strict=True)] if v else u
        g = [gi + compressor(vi - gi, seed=SEED, step=t) for gi, vi in zip(g, v, strict=True)]
        x = x - LR * sum(g) / WORKERS
        xs.append(x)
    return xs


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("name", COMPRESSORS)
def test_ef21_is_its_definition(name: str, beta: float) -> None:
    compressor = COMPRESSORS[name]
    traces = simulate(lambda rank: Run(compressor=compressor, memory="ef21", momentum=beta).trace(), WORKERS)
    for x, y, expected in zip(traces[1]["x"], traces[1]["y"], ef21_twin(compressor, beta, STEPS), strict=True):
        assert same(x, expected)
        assert same(y, x)  # nothing is ever pending


def quadratics(**options: Any) -> float:
    """Distance after 150 steps to the minimum of a mean of quadratics whose minima differ."""

    def worker(rank: int) -> float:
        rng = torch.Generator().manual_seed(rank)
        a = 0.5 + torch.rand(20, generator=rng, dtype=torch.float64)
        b = 5 * torch.randn(20, generator=rng, dtype=torch.float64)
        p = nn.Parameter(torch.zeros(20, dtype=torch.float64))
        opt = CompressedSGD([p], 0.15, **folded({"compressor": TopK(k=2), "dense_below": 0} | options))
        for _ in range(150):
            p.grad = a * p.detach() - b
            opt.step()
        sums = torch.stack([a, b])
        resolve(None).all_reduce(sums)
        return float((p.detach() - sums[1] / sums[0]).norm())

    return simulate(worker, WORKERS)[0]


@pytest.mark.nightly
@pytest.mark.slow
def test_ef21_converges_where_error_feedback_hovers() -> None:
    """Where workers disagree, error feedback with a constant step keeps a distance; EF21 has none (its Theorem 1)."""
    assert quadratics(memory="ef21") < 1e-7
    assert quadratics(memory="buffer") > 1


# ---- with other options


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
        ({"memory": "gradient"}, "memory must be one of buffer, ef21, got 'gradient'"),
        ({"memory": "ef21", "exchange": "two-way"}, "memory must be \"buffer\" with exchange 'two-way', got 'ef21'"),
        ({"momentum": 0.5, "lazy": True, "noise": 0.1}, "lazy noise needs plain error feedback"),
    ],
)
def test_what_does_not_go_together_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Run(**({"compressor": RandomK(0.25)} | options))


def test_a_state_or_a_dtype_that_does_not_fit_is_refused() -> None:
    state = Run(compressor=TopK(k=2), momentum=0.5).opt.state_dict()
    with pytest.raises(ValueError, match="direction is gradient here, but the state was saved with direction momentum"):
        Run(compressor=TopK(k=2)).opt.load_state_dict(state)
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"parameters of 32 or 64 bits, got torch\.bfloat16"):
        CompressedSGD([p], 0.1, **folded({"dense_below": 0, "memory": "ef21"}))
