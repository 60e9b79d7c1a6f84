"""Algorithm 1 on the cosine problem for many seeds, compiled: about a microsecond a step for d = 16.

The law of the iterates is that of `CompressedSGD` with a dense Gaussian oracle and `dense_below=0`: the oracle's noise
and xi_t are drawn as one Gaussian vector, whose variance is the sum of theirs. `packsaddle.reference.algorithm1` is the
same algorithm line by line, with which the tests compare this one.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from packsaddle.errors import require

Vector = NDArray[np.float64]
Selection = Literal["none", "RandomK", "TopK"]
_SELECTIONS: dict[Selection, int] = {"none": 0, "RandomK": 1, "TopK": 2}


@dataclass(frozen=True)
class Setting:
    """The cosine problem of `width`, started at its saddle of curvature -width, and the parameters of Algorithm 1."""

    d: int
    epsilon: float  # a point is an epsilon-SOSP if ||grad f|| <= epsilon and lambda_min >= -sqrt(epsilon)
    width: float
    deviation: float  # of each coordinate of the oracle's noise and xi_t together
    eta: float
    interval: int  # I
    radius: float  # R
    selection: Selection
    k: int  # coordinates sent per step


@dataclass(frozen=True)
class Escape:
    """What one run found; steps are None if it did not get there."""

    seed: int
    first: int | None  # step of the first epsilon-SOSP among the examined iterates
    half: int | None  # first step at which at least half of the examined iterates are epsilon-SOSPs
    share: float  # of epsilon-SOSPs among the examined iterates
    rolled_back: int  # segments that ended with x_t'


def escapes(setting: Setting, seeds: Iterable[int], *, limit: int, stride: int = 1, until_half: bool) -> list[Escape]:
    """Run Algorithm 1 for each seed and return what was found.

    Args:
        setting: problem and parameters.
        seeds: one run per seed.
        limit: the number of steps T.
        stride: every `stride`-th iterate is examined.
        until_half: stop once half of the examined iterates, of at least 20, are epsilon-SOSPs.
    """
    s, run = setting, compiled()
    found = []
    for seed in seeds:
        x = np.zeros(s.d)
        x[0] = math.pi * s.width
        first, half, share, rolled_back = run(
            *(x, s.epsilon, s.width, s.deviation, s.eta, s.interval, s.radius),
            *(_SELECTIONS[s.selection], s.k, seed, limit, stride, until_half),
        )
        found.append(Escape(seed, _step(first), _step(half), share, rolled_back))
    return found


def _step(t: int) -> int | None:
    return None if t < 0 else t


@cache
def compiled() -> Callable[..., Any]:
    """Return `algorithm1`, compiled by numba."""
    require("numba", "fast", "compiled runs")
    import numba

    run: Callable[..., Any] = numba.njit(algorithm1)
    return run


def algorithm1(
    x: Vector,
    epsilon: float,
    width: float,
    deviation: float,
    eta: float,
    interval: int,
    radius: float,
    selection: int,
    k: int,
    seed: int,
    limit: int,
    stride: int,
    until_half: bool,
) -> tuple[int, int, float, int]:
    """Run Algorithm 1 from x, float64[d], which ends as x_T; arguments as in `Setting`, results as in `Escape`.

    `selection` is 0 for none, 1 for RandomK, 2 for TopK. Steps are -1 if they did not occur.
    """
    np.random.seed(seed)
    d = len(x)
    e, v, order, start = np.zeros(d), np.zeros(d), np.arange(d), x.copy()
    begin, first, half, seen, good, rolled_back = 0, -1, -1, 0, 0, 0
    for t in range(limit + 1):
        # Examine x_t (Definition 2.4).
        if t % stride == 0:
            squares = (width * width * math.sin(x[0] / width)) ** 2
            smallest = width * math.cos(x[0] / width)
            for i in range(1, d):
                squares += math.sin(x[i]) ** 2
                smallest = min(smallest, math.cos(x[i]))
            seen += 1
            if squares <= epsilon * epsilon and smallest >= -math.sqrt(epsilon):
                good += 1
                if first < 0:
                    first = t
            if half < 0 and seen >= 20 and 2 * good >= seen:
                half = t
                if until_half:
                    break
        if t == limit:
            break

        # Lines 5 to 7: the escape check, by the distance of y = x - eta e from the segment's start.
        distance = 0.0
        for i in range(d):
            distance += (start[i] - (x[i] - eta * e[i])) ** 2
        if t - begin > interval or distance > radius * radius:
            fall = width**3 * (math.cos(x[0] / width) - math.cos(start[0] / width))
            for i in range(1, d):
                fall += math.cos(x[i]) - math.cos(start[i])
            if fall > 0:
                x -= eta * e
            else:
                x[:] = start
                rolled_back += 1
            begin = t
            start[:] = x
            e[:] = 0.0

        # Line 9 and the argument of line 10: v = e + gradient + noise.
        v[0] = e[0] + width * width * math.sin(x[0] / width)
        for i in range(1, d):
            v[i] = e[i] + math.sin(x[i])
        if deviation > 0:
            for i in range(d):
                v[i] += deviation * np.random.standard_normal()

        # Lines 10 to 12: selected coordinates move x, the others are the error.
        e[:] = v
        if selection == 0:
            x -= eta * v
            e[:] = 0.0
        elif selection == 1:
            for j in range(k):
                other = np.random.randint(j, d)
                order[j], order[other] = order[other], order[j]
                x[order[j]] -= eta * v[order[j]]
                e[order[j]] = 0.0
        else:
            magnitudes = np.abs(v)
            least, sent = np.partition(magnitudes, d - k)[d - k], 0
            for i in range(d):
                if magnitudes[i] >= least and sent < k:
                    x[i] -= eta * v[i]
                    e[i] = 0.0
                    sent += 1
    return first, half, good / seen, rolled_back
