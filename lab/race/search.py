"""A search for each contender's best step size.

All step sizes of one grid are tried with the first seed; then the best one is repeated with more seeds. Finished curves
are written to a file, and curves in the file are not made again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.race.contenders import parse
from lab.race.curves import Curve, Job, Training, best_rate, load, train_all
from packsaddle.comm import launch


@dataclass(frozen=True)
class Search:
    """The settings of a search with one number of workers: contenders, a grid of step sizes, and a number of seeds.

    The grid is for contenders whose text has no step size.
    """

    training: Training
    workers: int
    contenders: tuple[str, ...]
    grid: tuple[float, ...]
    seeds: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.workers <= 64:
            raise ValueError(f"workers must be 1 to 64, got {self.workers}")
        if self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, got {self.seeds}")
        for rate in self.grid:
            if not 0 < rate < float("inf"):
                raise ValueError(f"lrs must be positive and finite, got {rate}")
        if not self.grid or not self.contenders:
            raise ValueError(f"{'contenders' if self.grid else 'lrs'} must be at least one")
        for text in self.contenders:
            self._rates(text)

    def run(self, out: Path) -> None:
        """Make the curves that the file does not have. The workers are launched once per contender.

        Raises WorkerFailedError.
        """
        for text in dict.fromkeys(self.contenders):
            for jobs in (self.first, self.more):
                curves = load(out)
                done = {curve.job for curve in curves}
                if missing := [job for job in jobs(text, curves) if job not in done]:
                    launch(train_all, (self.training, missing, out), self.workers)

    def first(self, text: str, curves: Sequence[Curve]) -> list[Job]:
        """Return the jobs of a contender with the first seed: one per candidate step size."""
        return [Job(self.workers, text, rate, 0) for rate in self._rates(text)]

    def more(self, text: str, curves: Sequence[Curve]) -> list[Job]:
        """Return the jobs of a contender with further seeds, at its best step size.

        A contender may be listed several times with different step sizes, which are then the candidates. Returns [] if
        another one of these entries has the best step size.
        """
        key = self._key(text)
        mine = [c for c in curves if c.workers == self.workers and c.seed == 0 and self._key(c.contender) == key]
        if not mine:
            return []
        best = best_rate(mine)
        return [Job(self.workers, text, best, seed) for seed in range(1, self.seeds) if best in self._rates(text)]

    def _rates(self, text: str) -> tuple[float, ...]:
        """Return the candidate step sizes of a contender: the one in its text, or the grid."""
        own = parse(text, -1.0).lr
        return self.grid if own < 0 else (own,)

    def _key(self, text: str) -> tuple[str, int]:
        """Return the contender's method and number of steps, for which one best step size is searched."""
        contender = parse(text, 1.0)
        return contender.method, contender.steps or self.training.steps
