"""Runs of `CompressedSGD` with two workers, compared with a loop of plain SGD on the same stochastic gradients."""

import math

from lab.paper.compiled_runs import Setting
from lab.paper.library_runs import library_escapes
from lab.paper.problems import Cosine, Oracle
from packsaddle.compressors import Identity, SharedTopK

D, EPSILON, WIDTH, DEVIATION, ETA, LIMIT = 8, 0.4, 0.8, 0.1, 0.05, 400


def _times(seed: int) -> tuple[int, int]:
    """Return the first epsilon-SOSP and the step from which half of the iterates are, of plain SGD."""
    problem = Cosine(D, WIDTH)
    oracle = Oracle(problem, DEVIATION * math.sqrt(2 * D), workers=2, seed=1000 + seed)
    x = problem.critical_points()[1].x.clone()
    good: list[bool] = []
    for t in range(LIMIT):
        curvature = min(WIDTH * math.cos(float(x[0]) / WIDTH), *(math.cos(float(c)) for c in x[1:]))
        good.append(float(problem.gradient(x).norm()) <= EPSILON and curvature >= -math.sqrt(EPSILON))
        if t >= 19 and 2 * sum(good) >= len(good):
            return good.index(True), t
        x -= ETA * (oracle.gradient(x, step=t, worker=0) + oracle.gradient(x, step=t, worker=1)) / 2
    raise AssertionError("the run has not left the saddle")


def test_two_workers_take_the_steps_of_plain_sgd_on_their_mean_gradient() -> None:
    setting = Setting(D, EPSILON, WIDTH, DEVIATION, ETA, 10**6, 1e6, "none", D)
    for compressor in (Identity(), SharedTopK(k=D, block_size=1)):
        found = library_escapes(setting, compressor, 0.0, [3, 4], limit=LIMIT, stride=1)
        assert [(run.first, run.half) for run in found] == [_times(3), _times(4)]
        assert [run.rolled_back for run in found] == [0, 0]
