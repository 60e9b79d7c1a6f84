"""Naive twin of local updates: dense float64 vectors, W workers in a loop, one dictionary a worker, from the algorithm
alone; and the toy problem that it and `LocalUpdates` are run on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from packsaddle import Compression, Compressor, LocalUpdates, Overlap
from packsaddle.feedback.noise import Noise
from packsaddle.numerics.seeds import mix

SHAPES = {"w": (9, 7), "b": (5,), "u": (4, 6), "c": (3,)}  # b and c are vectors, and go dense
ORDER = ["w", "u", "b", "c"]  # compressed tensors first
Inner = Callable[[list[Tensor]], torch.optim.Optimizer]
INNERS: dict[str, Inner] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.05, betas=(0.8, 0.9), weight_decay=0.1),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.02, momentum=0.9, nesterov=True),
}
OUTERS: dict[str, Any] = {
    "none": None,
    "nesterov": lambda ps: torch.optim.SGD(ps, lr=0.7, momentum=0.9, nesterov=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.03),
}


@dataclass(frozen=True)
class Case:
    """One setting."""

    every: int
    compressor: Compressor
    fragments: int = 1
    delay: int = 0
    inner: str = "adamw"
    outer: str = "none"
    decay: float = 1.0
    noise: float = 0.0
    keep: bool = False  # x begins again at a - e
    mean_momentum: float = 0.0
    steps: int = 17
    seed: int = 5
    bad: dict[int, int] = field(default_factory=dict)  # inner step (from 1) after which which worker's x gets a NaN

    def cut(self) -> list[list[str]]:
        """The fragments of SHAPES, by hand: 63 + 5 + 24 + 3 coordinates, in order."""
        return {1: [["w", "b", "u", "c"]], 2: [["w"], ["b", "u", "c"]], 3: [["w"], ["b"], ["u", "c"]]}[self.fragments]


def begin(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """x_0."""
    rng = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, dtype=dtype, generator=rng) for name, shape in SHAPES.items()}


def gradient(name: str, x: Tensor, worker: int, step: int) -> Tensor:
    """Of a quadratic with each worker's own minimum, and noise."""
    rng = torch.Generator().manual_seed(1000 * worker + 7 * step + len(name) + ord(name[0]))
    noise = torch.randn(x.shape, dtype=torch.float64, generator=rng)
    return ((1 + worker % 2) * x + 0.3 * (worker - 1) + 0.5 * noise).to(x.dtype)


def made(case: Case, **options: Any) -> tuple[dict[str, Any], torch.optim.Optimizer, LocalUpdates]:
    """The parameters at x_0, their inner optimizer and its `LocalUpdates`."""
    parameters = {name: torch.nn.Parameter(value) for name, value in begin().items()}
    optimizer = INNERS[case.inner](list(parameters.values()))
    optimizer.param_groups[0]["param_names"] = list(parameters)
    local = LocalUpdates(
        optimizer,
        Compression(case.compressor, "direct", dense_below=1, decay=case.decay),
        every=case.every,
        outer=OUTERS[case.outer],
        overlap=Overlap(case.delay, case.fragments),
        noise=case.noise,
        keep_unsent=case.keep,
        mean_momentum=case.mean_momentum,
        seed=case.seed,
        **options,
    )
    return parameters, optimizer, local


def train(case: Case, worker: int, **options: Any) -> tuple[list[Tensor], LocalUpdates]:
    """Run `LocalUpdates` as this worker; return what it has in x after every step, float64[d], in ORDER."""
    parameters, optimizer, local = made(case, **options)
    seen = []
    for n in range(1, case.steps + 1):
        step(case, n, worker, parameters, optimizer)
        seen.append(flat(parameters))
    return seen, local


def step(case: Case, n: int, worker: int, parameters: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Do inner step n, from 1; a worker whose turn it is computes a NaN."""
    for name, p in parameters.items():
        p.grad = gradient(name, p.detach(), worker, n)
    if case.bad.get(n) == worker:
        parameters["u"].grad[0, 0] = float("nan")
    optimizer.step()


def flat(parameters: dict[str, Tensor]) -> Tensor:
    """All of them as a vector, in ORDER."""
    return torch.cat([parameters[name].detach().clone().reshape(-1) for name in ORDER])


@dataclass
class Twin:
    """What the twin ends with, and x of each worker after every step."""

    x: list[list[Tensor]]  # by worker, by step
    a: dict[str, Tensor]
    e: list[dict[str, Tensor]]


def twin(case: Case, workers: int, ends: Sequence[int] | None = None) -> Twin:
    """Run the algorithm; `ends` are the numbers of steps after which each worker trains no more."""
    starts, start = {}, 0
    for name in ORDER:
        starts[name] = start
        start += SHAPES[name][0] * (SHAPES[name][1] if len(SHAPES[name]) > 1 else 1)
    a = begin()
    xs = [{name: torch.nn.Parameter(value.clone()) for name, value in a.items()} for _ in range(workers)]
    inners = [INNERS[case.inner](list(x.values())) for x in xs]
    e = [{name: torch.zeros_like(value) for name, value in a.items()} for _ in range(workers)]
    leaves = {name: torch.nn.Parameter(value) for name, value in a.items()}  # the anchor
    outer = OUTERS[case.outer](list(leaves.values())) if OUTERS[case.outer] is not None else None
    t = [0] * case.fragments
    landing: dict[tuple[int, int], Any] = {}  # by step and fragment
    seen: list[list[Tensor]] = [[] for _ in range(workers)]
    for n in range(1, case.steps + 1):
        for i in range(workers):
            if ends is None or n <= ends[i]:
                step(case, n, i, xs[i], inners[i])
        with torch.no_grad():
            for p, names in enumerate(case.cut()):
                if (n, p) in landing:
                    _land(case, landing.pop((n, p)), names, leaves, outer, xs, inners, e)
            for p, names in enumerate(case.cut()):
                if (n + p * case.every // case.fragments) % case.every:
                    continue
                bad = [any(not bool(x[name].isfinite().all()) for name in names) for x in xs]
                moved = _exchange(case, names, p, t, leaves, xs, e, starts)
                before = [{name: x[name].clone() for name in names} for x in xs] if case.delay else None
                flight = (moved, before, bad)
                if case.delay:
                    landing[n + case.delay, p] = flight
                else:
                    _land(case, flight, names, leaves, outer, xs, inners, e)
        for i in range(workers):
            seen[i].append(flat(xs[i]))
    return Twin(seen, {name: leaf.detach() for name, leaf in leaves.items()}, e)


def _exchange(
    case: Case,
    names: list[str],
    p: int,
    t: list[int],
    leaves: dict[str, Any],
    xs: Sequence[dict[str, Any]],
    e: list[dict[str, Tensor]],
    starts: dict[str, int],
) -> dict[str, Tensor] | None:
    """The mean of C(v_i) by name, with e changed; None where a v_i is not finite."""
    names = [name for name in ORDER if name in names]
    compressed = [name for name in names if len(SHAPES[name]) > 1]
    xi = Noise(case.noise).vector(torch.zeros(95, dtype=torch.float64), seed=case.seed, step=t[p])
    vs = []
    for i, x in enumerate(xs):
        start = {name: leaves[name] - e[i][name] if case.keep else leaves[name] for name in names}
        v = {name: case.decay * e[i][name] + (start[name] - x[name]) for name in names}
        if xi is not None:
            v = {n: u + xi[starts[n] : starts[n] + u.numel()].view(u.shape) for n, u in v.items()}
        vs.append(v)
    if not all(bool(u.isfinite().all()) for v in vs for u in v.values()):
        return None
    seed = case.seed if case.fragments == 1 else mix(case.seed, starts[names[0]])
    mean = {name: torch.zeros_like(vs[0][name]) for name in names}
    for i, v in enumerate(vs):
        sent = dict(v)
        if compressed:
            whole = torch.cat([v[name].reshape(-1) for name in compressed])
            own = mix(seed, i + 1) if case.compressor.private else seed
            message = case.compressor(whole, seed=own, step=t[p])
            pieces = torch.split(message, [v[name].numel() for name in compressed])
            sent |= {name: piece.view(v[name].shape) for name, piece in zip(compressed, pieces, strict=True)}
        for name in names:
            e[i][name] = v[name] - sent[name]
            mean[name] += sent[name] / len(vs)
    t[p] += 1
    return mean


def _land(
    case: Case,
    flight: Any,
    names: list[str],
    leaves: dict[str, Any],
    outer: Any,
    xs: Sequence[dict[str, Any]],
    inners: Sequence[Any],
    e: list[dict[str, Tensor]],
) -> None:
    mean, before, bad = flight
    kept = e if case.keep else None
    if mean is None:
        for i, (x, inner) in enumerate(zip(xs, inners, strict=True)):
            if bad[i]:
                for name in names:
                    x[name].copy_(leaves[name] - (kept[i][name] if kept else 0.0))
                _forget(inner)
        return
    for name in names:
        if outer is None:
            leaves[name] -= mean[name]
        else:
            leaves[name].grad = mean[name]
    if outer is not None:
        outer.step()
        outer.zero_grad()
    for i, x in enumerate(xs):
        for name in names:
            since = 0.0 if before is None else x[name] - before[i][name]
            x[name].copy_(leaves[name] - (kept[i][name] if kept else 0.0) + since)
            if case.mean_momentum and mean[name].any():
                state = inners[i].state[x[name]]
                m, d = state["exp_avg"], state["exp_avg_sq"] ** 0.5 * mean[name]
                c = case.mean_momentum
                state["exp_avg"].copy_((1 - c) * m + c * m.norm() / d.norm() * d)


def _forget(inner: torch.optim.Optimizer) -> None:
    for p, state in list(inner.state.items()):
        if any(isinstance(s, Tensor) and not bool(s.isfinite().all()) for s in state.values()):
            del inner.state[p]
