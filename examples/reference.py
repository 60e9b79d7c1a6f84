"""Algorithm 1 of "Escaping Saddle Points with Compressed SGD" on plain tensors, line by line: the file to read first.

W workers minimize f, the mean of their objectives f_i, from one point x of d coordinates. In every iteration

- worker i computes a stochastic gradient of f_i at x and adds the noise xi, which is identical on all workers
  (line 9), and its error memory e^(i), the accumulated residuals of compression;
- it sends the compressed sum g^(i) = C(v^(i)) of v^(i) = e^(i) + gradient + xi (line 10);
- all workers apply the mean: x <- x - eta mean_i g^(i) (line 11);
- the residual is the new error memory: e^(i) = v^(i) - g^(i) (line 12).

So updates are delayed but not lost: with e the mean error memory, y = x - eta e changes by exactly
-eta (mean gradient + xi) for any C. Noise and negative curvature move x away from a saddle. The escape check (lines 5
to 7) divides the run into segments. A segment ends after more than `interval` iterations, or when y is farther than
`radius` from the segment's start point. Then x is set to y if f has decreased since the segment's start,
else to the start point, and the error memories are cleared.

One loop runs all workers on dense vectors. `CompressedSGD` computes the same iterates across processes, up to rounding,
with `exchange="direct"`, `dense_below=0`, a constant learning rate, noise that is not lazy, and no options that
Algorithm 1 lacks, such as momentum. There are two exceptions. With several workers `SharedTopK` and `SketchTopK` select
the largest coordinates of the mean of v^(i), whereas this loop selects the largest coordinates of each v^(i). `LowRank`
starts from its factors of the previous step, whereas this loop draws them anew. The tests compare `CompressedSGD` with
this loop for all other compressors.

Two workers with quadratic objectives, minimal at (1, 2) and (3, 6), minimize the mean and send one coordinate per step:

>>> import torch
>>> from packsaddle import RandomK
>>> from examples.reference import algorithm1
>>> minima = torch.tensor([[1.0, 2.0], [3.0, 6.0]])
>>> gradients = [lambda x, t, m=m: x - m for m in minima]
>>> algorithm1(torch.zeros(2), gradients, RandomK(k=1), eta=0.1, steps=300).x[-1]
tensor([2.0000, 4.0000])
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from packsaddle import Compressor
from packsaddle.numerics.seeds import Stream, add_gaussians, keys, mix

Gradient = Callable[[Tensor, int], Tensor]  # (x_t, t) -> grad F_i(x_t, theta_t), float[d]; t selects the sample theta_t


@dataclass(frozen=True)
class Check:
    """Settings of the escape check, which divides a run into segments (lines 5 to 7 of Algorithm 1)."""

    objective: Callable[[Tensor], float]  # x -> f(x), the mean objective of all workers
    interval: float = math.inf  # I; a segment ends when more than I iterations have passed
    radius: float = math.inf  # R; a segment ends when y is farther than R from the segment's start point


@dataclass
class Trace:
    """All iterates of a run of `algorithm1`. The result of the run is `x[-1]`, the only output of the algorithm in the
    paper."""

    x: list[Tensor] = field(default_factory=list)  # x_0 ... x_T, float[d]; x_t is after the escape check of iteration t
    e: list[Tensor] = field(default_factory=list)  # e_0 ... e_T, float[d], mean error memories, in gradient units
    resets: list[tuple[int, bool]] = field(default_factory=list)  # for each segment: t at its end, True if f decreased


def algorithm1(
    x: Tensor,
    gradients: Sequence[Gradient],
    compressor: Compressor,
    *,
    eta: float,
    steps: int,
    r: float = 0.0,
    check: Check | None = None,
    seed: int = 0,
) -> Trace:
    """Run Algorithm 1 for T = `steps` iterations from x, float[d], on one worker for each of `gradients`.

    Args:
        compressor: C. Its randomness is a function of (seed, t), identical on all workers, or of (seed, t, i) if it is
            `private`, as `QSGD` is. If it depends on the shapes of tensors, pass the result of `for_tensors`.
        eta: the step size.
        r: standard deviation of each coordinate of the noise xi_t.
        check: the escape check, or None for no check.
    """
    trace = Trace()
    seeds = [mix(seed, i + 1) if compressor.private else seed for i in range(len(gradients))]
    e = [torch.zeros_like(x) for _ in gradients]  # line 1
    x_start, t_start = x, 0  # line 2 of Algorithm 1; `t_start` is the paper's t'
    for t in range(steps):  # line 3
        y = x - eta * mean(e)
        if check and (t - t_start > check.interval or (x_start - y).norm() > check.radius):  # lines 4 and 5
            decreased = check.objective(x) < check.objective(x_start)
            x = y if decreased else x_start  # line 6
            x_start, t_start, e = x, t, [torch.zeros_like(x) for _ in gradients]  # line 7
            trace.resets.append((t, decreased))
        trace.x.append(x)
        trace.e.append(mean(e))
        xi = noise(x, r, seed, t)  # line 9
        v = [e_i + gradient(x, t) + xi for e_i, gradient in zip(e, gradients, strict=True)]
        g = [compressor(v_i, seed=own, step=t) for v_i, own in zip(v, seeds, strict=True)]  # line 10
        x = x - eta * mean(g)  # line 11
        e = [v_i - g_i for v_i, g_i in zip(v, g, strict=True)]  # line 12
    trace.x.append(x)
    trace.e.append(mean(e))
    return trace  # line 14 of Algorithm 1: `trace.x[-1]` is x_T


def mean(vectors: Sequence[Tensor]) -> Tensor:
    """Return the mean over workers of `vectors`, which has one float[d] per worker."""
    return sum(vectors, torch.zeros_like(vectors[0])) / len(vectors)


def noise(like: Tensor, r: float, seed: int, t: int) -> Tensor:
    """Return the noise xi_t ~ N(0, r^2 Id) of iteration t as a vector with the shape and dtype of `like`, float[d]. It
    is a pure function of (seed, t)."""
    xi = torch.zeros_like(like)
    add_gaussians(xi, r, keys(seed, t, Stream.NOISE))
    return xi
