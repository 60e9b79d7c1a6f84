"""`CompressedSGD` with two workers on the cosine problem, for compressors that select by what several workers have.

The law of the mean gradient is that of `compiled_runs`: each worker's oracle has twice the variance, and the noise xi_t
is the workers' own shared one.
"""

import math
from collections.abc import Iterable
from functools import partial

import torch

import packsaddle
from lab.paper.compiled_runs import Escape, Setting
from lab.paper.problems import Cosine, Oracle
from lab.paper.proof import Method
from lab.paper.proof.trajectory import Run
from lab.paper.theorem import stationary
from packsaddle.compressors import Compressor
from packsaddle.theory import Assumptions

WORKERS = 2


def library_escapes(
    setting: Setting, compressor: Compressor, noise: float, seeds: Iterable[int], *, limit: int, stride: int
) -> list[Escape]:
    """Run each seed until half of the examined iterates, at least 20, are epsilon-SOSPs; see `compiled_runs.escapes`.

    `noise` is the standard deviation of each coordinate of xi_t; the rest of the setting's `deviation` is the oracle's.
    """
    torch.set_num_threads(1)
    run = partial(_escape, setting, compressor, noise, limit, stride)
    return [packsaddle.simulate(partial(run, seed), WORKERS)[0] for seed in seeds]


def _escape(
    setting: Setting, compressor: Compressor, noise: float, limit: int, stride: int, seed: int, _rank: int
) -> Escape:
    problem, known = Cosine(setting.d, setting.width), Assumptions(setting.d, setting.epsilon)
    sigma = math.sqrt(WORKERS * setting.d * (setting.deviation**2 - noise**2))
    run = Run(
        Oracle(problem, sigma, workers=WORKERS, seed=1000 + seed),
        Method(setting.eta, compressor, noise),
        problem.critical_points()[1].x,
        seed=seed,
        segment=(setting.interval, setting.radius),
    )
    first = half = None
    seen = good = 0
    for t in range(limit + 1):
        # Examine x_t (Definition 2.4), the same on both workers.
        if t % stride == 0:
            seen += 1
            if stationary(problem, run.x, known):
                good += 1
                first = t if first is None else first
            if seen >= 20 and 2 * good >= seen:
                half = t
                break
        if t < limit:
            run.advance()
    return Escape(seed, first, half, good / seen, sum(not reset.committed for reset in run.optimizer.resets))
