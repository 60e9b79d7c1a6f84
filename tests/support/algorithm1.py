"""Naive twin: Algorithm 1 transcribed from the paper, W workers in a loop, dense vectors, e in units of a gradient."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packsaddle import Compressor
from packsaddle.feedback.noise import Noise


@dataclass
class Trace:
    """What the twin saw, for every t."""

    x: list[Tensor] = field(default_factory=list)
    e: list[Tensor] = field(default_factory=list)  # e_t, the mean over workers
    resets: list[tuple[int, bool]] = field(default_factory=list)  # (t, committed)


def algorithm1(
    x: Tensor,
    gradients: Sequence[Callable[[Tensor], Tensor]],
    compressor: Compressor,
    *,
    eta: float,
    steps: int,
    r: float,
    seed: int,
    interval: int | None = None,
    radius: float = float("inf"),
    f: Callable[[Tensor], float] = lambda x: 0.0,
) -> Trace:
    """Run T = `steps` iterations and, as `CompressedSGD` does, the check of lines 4-8 once more at x_T."""
    workers = len(gradients)
    trace = Trace()
    e = [torch.zeros_like(x) for _ in range(workers)]  # line 1
    x_anchor, t_anchor = x.clone(), 0  # line 2
    for t in range(steps + 1):  # line 3
        mean_e = sum(e, torch.zeros_like(x)) / workers
        y = x - eta * mean_e
        if interval is not None and (t - t_anchor > interval or (x_anchor - y).norm() > radius):  # line 5
            committed = f(x) < f(x_anchor)
            x = y if committed else x_anchor  # line 6
            t_anchor, x_anchor = t, x.clone()  # line 7
            e = [torch.zeros_like(x) for _ in range(workers)]
            trace.resets.append((t, committed))
        trace.x.append(x.clone())
        trace.e.append(sum(e, torch.zeros_like(x)) / workers)
        if t == steps:
            break
        xi = Noise(r).vector(x, seed=seed, step=t)  # line 9
        corrected = [e[i] + gradients[i](x) + (xi if xi is not None else 0.0) for i in range(workers)]
        g = [compressor(v, seed=seed, step=t) for v in corrected]  # line 10
        x = x - eta * sum(g, torch.zeros_like(x)) / workers  # line 11
        e = [v - c for v, c in zip(corrected, g, strict=True)]  # line 12
    return trace
