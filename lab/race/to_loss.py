"""The race to a loss: the curve of each contender, its step time on each link, and the resulting time to the loss.

The folder of a race has `curves.csv` and `steps.csv`. Rows are appended to both, so that an interrupted race can be
resumed, and contenders added later; tables are made from these files alone. `race.json` has the network,
its data and the recipe.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lab.bench.hosts import Hosts, available
from lab.bench.result import Result
from lab.origin import Origin, check_text, described
from lab.race.contenders import ALONE, DENSE, parse
from lab.race.curves import Curve, Training, load
from lab.race.race import Race
from lab.race.recipe import Recipe
from lab.race.search import Search
from lab.race.time_to_loss import (
    Rates,
    StepOnLink,
    computing,
    dense_of,
    entries,
    load_steps,
    rows,
    save_steps,
    targets_of,
    verdicts,
)
from lab.race.train import hold

Part = Literal["all", "curves", "steps", "tables"]


@dataclass(frozen=True)
class FullRace:
    """The settings of a race, identical for all numbers of workers."""

    folder: Path
    training: Training
    workers: tuple[int, ...]
    contenders: tuple[str, ...]
    grid: tuple[float, ...]
    seeds: int
    links: tuple[Rates, ...]
    rounds: int = 3
    block: int = 2

    def run(self, part: Part) -> list[Result]:
        """Make the missing results of a part of the race, and return its tables.

        Raises ValueError for invalid settings or data, and WorkerFailedError.
        """
        if part not in get_args(Part):
            raise ValueError(f"only must be one of {', '.join(get_args(Part))}, got {part!r}")
        searches = [Search(self.training, w, self.contenders, self.grid, self.seeds) for w in self.workers]
        if part in ("all", "steps") and (reason := available()):
            raise ValueError(f"loss {reason}; --only curves makes what needs no link")
        self.training.workload.examples()  # raises an error about unreadable data here rather than in a worker
        self._claim(makes=part != "tables")
        for rows_of, name in ((load, "curves.csv"), (load_steps, "steps.csv")):
            origins = [row.origin for row in rows_of(self.folder / name)]
            check_text(origins, self.training.workload.text_hash(), self.folder / name)
        if part in ("all", "curves"):
            for search in searches:
                search.run(self.folder / "curves.csv")
        if part in ("all", "steps"):
            for workers in self.workers:
                self._time_steps(workers)
        return self._tables()

    def _claim(self, *, makes: bool) -> None:
        """Raise ValueError if the folder has the results of a race with different settings.

        Otherwise, and if `makes` is True, the settings are written to the folder.
        """
        path, workload = self.folder / "race.json", self.training.workload
        mine = {
            "model": workload.network,
            "data": workload.source(),
            "batch": workload.batch,
            "optimizer": self.training.optimizer,
            "steps": self.training.steps,
            "every": self.training.every,
        }
        if path.exists():
            theirs = json.loads(path.read_text())
            for name, value in mine.items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"out must be the folder of a race of {name} {value!r}, got {self.folder}, which is of "
                        f"{theirs.get(name)!r}"
                    )
        elif makes:
            partial = path.with_suffix(".partial")
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                partial.write_text(f"{json.dumps(mine, indent=1)}\n")
            except OSError as error:
                raise ValueError(f"out {self.folder} cannot be written: {error.strerror}") from None
            partial.replace(path)

    def _time_steps(self, workers: int) -> None:
        """Time the steps of all contenders that were not timed on a link yet; contenders alternate."""
        path = self.folder / "steps.csv"
        for link in self.links:
            done = {s.contender for s in load_steps(path) if s.workers == workers and s.link == link}
            missing = tuple(text for text in _once(self.contenders) if text not in done)
            if not missing:
                continue
            recipe = Recipe(self.training.optimizer, self.training.steps)
            race = Race(self.training.workload, missing, self.grid[0], self.rounds, self.block, recipe)
            with Hosts(workers, link.down, link.up) as network:
                outcome = hold(race, network)
            laps = [lap for lap in outcome.laps if lap.contender not in done]
            origin = Origin.here(threads=1, text=self.training.workload.text_hash())
            save_steps(path, [StepOnLink.of(workers, link, lap, origin) for lap in laps])

    def _tables(self) -> list[Result]:
        """Return the tables of all stored results, two or three per number of workers."""
        curves, steps = load(self.folder / "curves.csv"), load_steps(self.folder / "steps.csv")
        found = []
        for workers in self.workers:
            mine = [curve for curve in curves if curve.workers == workers]
            timed = [step for step in steps if step.workers == workers]
            found += tables(self, workers, mine, timed)
        return found


def tables(race: FullRace, workers: int, curves: list[Curve], steps: list[StepOnLink]) -> list[Result]:
    """Return the tables for one number of workers.

    They are losses and times to the loss, the best methods on each link, and the fractions of time spent computing.
    """
    workload = race.training.workload
    setting = {
        "workers": workers,
        "model": workload.network,
        "d": sum(p.numel() for p in workload.task().parameters()),
        "data": workload.source(),
        "batch per worker": workload.batch,
        "steps": race.training.steps,
        "optimizer": race.training.optimizer,
        "lrs": ", ".join(f"{rate:g}" for rate in race.grid),
        **described([curve.origin for curve in curves] + [step.origin for step in steps]),
    }
    found = []
    if (dense := dense_of(entries(curves))) is not None:
        table = rows(curves, steps)
        target = ", ".join(f"{loss:.4f}" for loss in targets_of(dense).values())
        notes = [
            f"target: the loss of {DENSE} at nine tenths of its tokens, by seed ({target}); times are steps to it, the "
            "mean over seeds, times the step's median on the link; inf: a seed did not reach it",
            "loss: of the mean of the workers' models on 512 held-out examples; mean, low and high over seeds, at the "
            "best step size of the grid; tokens: of ddp's; kB: sent by a worker in a step; MB memory: a process's peak",
        ]
        found.append(
            Result("How good is each method, and how long to the target loss?", setting, table, notes, digits=4)
        )
        if steps:
            found.append(Result("Who is first at the target loss on each link?", setting, verdicts(table, steps)))
    if shares := computing(steps):
        note = f"{ALONE}'s step over the contender's; hosts are network namespaces that share this machine's cores"
        found.append(Result("Which share of the time do workers compute?", setting, shares, [note]))
    return found


def _once(contenders: Iterable[str]) -> list[str]:
    """Return one contender per method, since the time of a step does not depend on step size and training length."""
    return list(dict.fromkeys(parse(text, 1.0).method for text in (ALONE, DENSE, *contenders)))
