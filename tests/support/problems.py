"""Toy problems with a different objective on each worker, for trajectories in double precision."""

from collections.abc import Callable
from typing import Any

import torch
from specs import folded
from torch import Tensor, nn

from packsaddle import CompressedSGD, Compression, Compressor, Escape, Noise
from packsaddle.comm.group import resolve

D = 12


def worker_data(rank: int) -> tuple[Tensor, Tensor]:
    """Return this worker's curvatures and shift, float64[D]."""
    rng = torch.Generator().manual_seed(100 + rank)
    return torch.randn(D, generator=rng, dtype=torch.float64), torch.randn(D, generator=rng, dtype=torch.float64)


def f_i(x: Tensor, rank: int) -> Tensor:
    """Return f_i(x) = 1/2 sum a x^2 + 1/4 sum x^4 + <b, x>, a scalar.

    There are saddles, since some curvatures a are negative. a and b differ between workers.
    """
    a, b = worker_data(rank)
    return (a * x**2 / 2 + x**4 / 4 + b * x).sum()


def gradient(rank: int) -> Callable[[Tensor], Tensor]:
    """Return the function grad f_i of this worker, in closed form."""
    a, b = worker_data(rank)
    return lambda x: a * x + x**3 + b


def start() -> Tensor:
    """Return x_0, float64[D]."""
    return torch.linspace(-0.6, 0.9, D, dtype=torch.float64)


def run(
    compressor: Compressor,
    *,
    steps: int,
    lr: float = 0.05,
    noise: float = 0.02,
    seed: int = 5,
    interval: int | None = None,
    radius: float = 1e9,
    compare: Any = "x",
    exchange: str = "direct",
    back: Compressor | None = None,
    lazy: bool | None = False,
) -> dict[str, Any]:
    """Run CompressedSGD in the current group and return its trajectory.

    x consists of two parameters, of which all coordinates are compressed.
    """
    rank = resolve(None).rank
    weights = [nn.Parameter(start()[:8].reshape(2, 4).clone()), nn.Parameter(start()[8:].clone())]

    def objective() -> Tensor:
        return f_i(torch.cat([w.reshape(-1) for w in weights]), rank)

    escape = None if interval is None else Escape(interval, radius, objective, compare=compare)
    opt = CompressedSGD(
        weights,
        lr,
        Compression(compressor, dense_below=0, exchange=exchange, back=back),
        noise=Noise(noise, lazy=lazy),
        escape=escape,
        seed=seed,
    )
    xs, es, ys = [], [], []
    for t in range(steps + 1):
        xs.append(torch.cat([w.detach().reshape(-1) for w in weights]).clone())
        es.append(opt.error())
        ys.append(opt.corrected())
        if t < steps:
            opt.zero_grad()
            objective().backward()
            opt.step()
    return {
        "x": torch.stack(xs),
        "e": torch.stack(es),
        "y": torch.stack(ys),
        "own": torch.cat([s["error"].reshape(-1) for s in opt.state.values()]),
        "resets": [(r.step, r.committed) for r in opt.resets],
        "bytes": {name: (b.payload, b.sent, b.received) for name, b in opt.ledger.by_purpose.items()},
    }


def network(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """Return a small network in double precision, and a fixed batch for it."""
    rng = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3, generator=rng)
    return model, torch.randn(16, 6, generator=rng, dtype=torch.float64)


def vector(model: nn.Module) -> Tensor:
    """Return a copy of a model's parameters as one vector, float[d]."""
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def lone(x: Tensor, lr: float, compressor: Compressor, **options: Any) -> tuple[nn.Parameter, CompressedSGD]:
    """Return a parameter with the initial value x, and a CompressedSGD that compresses all its coordinates.

    `options` are those of `folded`.
    """
    p = nn.Parameter(x.clone())
    return p, CompressedSGD([p], lr, **folded({"compressor": compressor, "dense_below": 0} | options))


def feed(p: nn.Parameter, opt: CompressedSGD, *gradients: float | Tensor) -> None:
    """Do one step with each of these gradients. A number stands for a gradient with equal coordinates."""
    for g in gradients:
        p.grad = g.clone() if isinstance(g, Tensor) else torch.full_like(p, g)
        opt.step()
