"""One run from the saddle: the step at which it has left, and whether it settles at a minimum."""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import packsaddle
from lab.saddles.methods import EVERY, METHODS, Method, local_settings
from lab.saddles.saddle import DEPTH, Objective, Saddle
from packsaddle import LocalUpdates

LIMIT, SETTLE = 4000, 300  # steps at the saddle, and after it
CERTIFIED_HVPS = 20  # at most, per certificate


@dataclass(frozen=True)
class Row:
    """One run."""

    method: str
    kind: str
    n: int
    lr: float
    seed: int
    steps: int  # until |s| >= 1/2; LIMIT: it has not left; -1: it diverged
    settled: bool


@dataclass
class Path:
    """What a run recorded, at the anchor for local updates."""

    steps: int  # see Row
    values: list[float]  # f at the SETTLE steps after it has left
    left_at: Tensor | None  # W at the first |s| >= 1/2, float[n, n]
    mean: Tensor | None  # mean of W over the second half of `values`, float[n, n]

    @property
    def settled(self) -> bool:
        """True if the mean of f over the second half is below that of the saddle by half of the depth."""
        half = self.values[SETTLE // 2 :]
        return len(self.values) == SETTLE and statistics.fmean(half) < -DEPTH / 2


def run(name: str, saddle: Saddle, lr: float) -> Row:
    """Run a method from the saddle until it has left and settled, diverged, or reached the limit."""
    path = follow(name, saddle, lr)
    return Row(name, saddle.kind, saddle.n, lr, saddle.seed, path.steps, path.settled)


def follow(name: str, saddle: Saddle, lr: float) -> Path:
    """Run a method, see `run`, and return what it recorded."""
    method = METHODS[name]
    if method.local is None:
        return _follow(method, saddle, lr, 0)
    return packsaddle.simulate(partial(_follow, method, saddle, lr), method.workers)[0]


def _follow(method: Method, saddle: Saddle, lr: float, rank: int) -> Path:
    w = torch.nn.Parameter(torch.zeros(saddle.n, saddle.n))
    (optimizer,) = method.make([w], [], lr)
    local = None if method.local is None else LocalUpdates(optimizer, local_settings(method.local), every=EVERY)
    gradient = saddle.gradients(rank, 1 if local else method.workers)
    measure = saddle.gradients(method.workers)  # s and f at the anchor; its noise is not used
    path, s, value = Path(LIMIT, [], None, None), 0.0, 0.0
    for step in range(LIMIT + SETTLE):
        with torch.no_grad():
            if local is None:
                s, value, w.grad = gradient(w)
            else:
                if step % EVERY == 0:  # all workers have one anchor
                    with local.at_anchor():
                        s, value, _ = measure(w)
                w.grad = gradient(w)[2]

        # Diverged, left, stayed, or settled.
        if not value < 1e3:
            path.steps = -1
            return path
        if path.left_at is None and abs(s) >= 0.5:
            path.steps, path.left_at = step, w.detach().clone()
        if path.left_at is None and step >= LIMIT:
            return path
        if path.left_at is not None:
            path.values.append(value)
            if len(path.values) > SETTLE // 2:
                path.mean = w.detach() / (SETTLE // 2) if path.mean is None else path.mean + w.detach() / (SETTLE // 2)
            if len(path.values) == SETTLE:
                return path
        optimizer.step()
    return path


def certify(w: Tensor, saddle: Saddle, epsilon: float | None) -> packsaddle.Certificate:
    """Certify f at W; rho is the largest third derivative for |s| <= 1, 6 GAMMA."""
    return packsaddle.certify(
        Objective(w),
        lambda model, v: model(v),
        [saddle.direction()],
        epsilon=epsilon,
        hessian_lipschitz=24 * DEPTH,
        search=packsaddle.Search(max_hvps=CERTIFIED_HVPS),
    )
