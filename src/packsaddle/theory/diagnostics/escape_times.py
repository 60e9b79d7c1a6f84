"""How long saddles hold a run: escape times over seeds, and the octopus, which is escaped leg by leg."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packsaddle.theory.diagnostics.trajectory import Method, Run
from packsaddle.theory.problems import Octopus, Oracle


@dataclass(frozen=True)
class EscapeTimes:
    """Steps until the run had left the ball, one per seed, in the order of seeds."""

    times: Tensor  # float64[seeds]; inf where it had not within the limit
    improved: int  # of the escapes, how many line 6 accepted: f(x_t) < f(x_0)

    def quantile(self, q: float) -> float:
        """Return the q-quantile, an observed time (the lower of two neighbours); inf counts as late."""
        return float(torch.quantile(self.times, q, interpolation="lower"))

    @property
    def median(self) -> float:
        """The median number of steps."""
        return self.quantile(0.5)


def escape_times(
    oracle: Oracle, method: Method, start: Tensor, *, radius: float, limit: int, seeds: int
) -> EscapeTimes:
    """Run from `start`, float[d], until Algorithm 1's own check (line 5) finds ||y_t - x_0|| > R = `radius`.

    Run s of `seeds` uses seed s for the optimizer and the oracle's seed plus s. Raises ValueError unless `seeds` and
    `limit`, in steps, are at least 1, and see `Run` and `Escape`.
    """
    for name, value in (("seeds", seeds), ("limit", limit)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    times, improved = [], 0
    for s in range(seeds):
        run = Run(replace(oracle, seed=oracle.seed + s), method, start, seed=s, segment=(limit, radius))
        resets = run.optimizer.resets
        while run.optimizer.steps < limit and not resets:
            run.advance()
        times.append(float(resets[0].step) if resets else math.inf)
        improved += sum(reset.committed for reset in resets)
    return EscapeTimes(torch.tensor(times, dtype=torch.float64), improved)


def octopus_escapes(problem: Octopus, points: Tensor) -> list[int]:
    """Return the steps at which a trajectory, float[T + 1, d], enters the next leg: one per saddle that it leaves.

    A leg entered twice counts twice, so "exactly d escapes" says that no saddle was visited again. Raises ValueError
    where the trajectory leaves the domain of the function.
    """
    for x in points:
        problem(x)
    stages = [problem.stage(x) for x in points]
    return [t for t in range(1, len(stages)) for _ in range(stages[t] - stages[t - 1])]
