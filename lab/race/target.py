"""A race to a target loss by the clock: finds the missing runs, does them on links, and makes tables of all runs.

The folder of a race has `runs.csv` and `steps.csv`; a row is added after each training, so an interrupted race
continues where it ended.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lab.bench.hosts import HostFailedError, Hosts, available
from lab.bench.result import Result
from lab.origin import check_text, described
from lab.race.target_run import Jobs, TargetRun, TargetStep, Training, load_runs, load_steps, work
from lab.race.target_settings import Inner, Method, TargetSettings, alone, predicted_steps
from lab.race.time_to_loss import Rates
from lab.race.workload import TrainingWorkload
from packsaddle.comm import WorkerFailedError, launch

Part = Literal["all", "steps", "runs", "plan", "tables"]
LOCAL = "local"  # the name, instead of a link's rate, for processes without a slow link


@dataclass(frozen=True)
class TargetRace:
    """A race's settings and folder, restricted to some methods, links, numbers of workers and seeds."""

    settings: TargetSettings
    folder: Path
    methods: tuple[str, ...]
    workers: tuple[int, ...]
    rates: tuple[str, ...]
    seeds: int

    def __post_init__(self) -> None:
        for name in self.methods:
            self.settings.method(name)
        for rate in self.rates:
            if rate != LOCAL:
                Rates.parse(rate)

    def run(self, part: Part) -> list[Result]:
        """Measure the missing rows of a part of the race, and return its tables.

        Raises ValueError for invalid rows or settings, and WorkerFailedError.
        """
        text = TrainingWorkload("gpt", self.settings.batch, self.settings.text or None).text_hash()
        origins = [*(run.origin for run in self.trainings()), *(step.origin for step in self.timed())]
        check_text(origins, text, self.folder)
        if part in ("all", "steps", "runs"):
            if any(rate != LOCAL for rate in self.rates) and (reason := available()):
                raise ValueError(f"target {reason}; --rates {LOCAL} needs no link")
            self.folder.mkdir(parents=True, exist_ok=True)
        if part in ("all", "steps"):
            self._launch_all(self.missing_steps())
        if part in ("all", "runs"):
            self._launch_all(self.missing_runs())
        if part == "steps":
            return [self._step_table()]
        return [self._plan()] if part == "plan" else self._tables()

    def trainings(self) -> list[TargetRun]:
        """Return the stored rows of trainings to this race's target."""
        rows = load_runs(self.folder / "runs.csv")
        return [row for row in rows if row.target == self.settings.target]

    def timed(self) -> list[TargetStep]:
        """Return the stored rows of timed steps."""
        return load_steps(self.folder / "steps.csv")

    def missing_steps(self) -> Iterator[tuple[int, Jobs]]:
        """Yield, for each link on which some methods are not timed yet, the number of workers and the jobs."""
        done = {(row.workers, row.rate, row.method) for row in self.timed()}
        for workers in self.workers:
            for rate in self.rates:
                if timed := tuple(name for name in self.methods if (workers, rate, name) not in done):
                    yield workers, Jobs(self.settings, str(self.folder), rate, timed=timed)

    def missing_runs(self) -> Iterator[tuple[int, Jobs]]:
        """Yield, for each link with missing trainings, the number of workers and the jobs; methods alternate."""
        done = {(row.workers, row.rate, row.method, row.seed) for row in self.trainings()}
        for workers in self.workers:
            for rate in self.rates:
                every = (Training(name, seed) for seed in range(self.seeds) for name in self.methods)
                if missing := tuple(job for job in every if (workers, rate, job.method, job.seed) not in done):
                    yield workers, Jobs(self.settings, str(self.folder), rate, missing)

    def _launch_all(self, groups: Iterator[tuple[int, Jobs]]) -> None:
        for workers, jobs in groups:
            if jobs.rate == LOCAL:
                launch(work, (jobs,), workers)
            else:
                _on_hosts(jobs, workers)

    def steps(self, method: Method, workers: int) -> tuple[float, float, float] | None:
        """Return the mean, minimum and maximum over seeds of a method's steps to the target, or None if unknown.

        They are from simulated trainings if there are any, otherwise from trainings on any link.
        """
        if not method.overlap and (found := predicted_steps(method, workers, self.settings.target)):
            return found
        runs = [run for run in self.trainings() if (run.workers, run.method) == (workers, method.name) and run.reached]
        by_seed = {run.seed: run.steps for run in runs}
        return (statistics.fmean(by_seed.values()), min(by_seed.values()), max(by_seed.values())) if by_seed else None

    def predicted(self, method: Method, workers: int, rate: str) -> tuple[float, float, float] | None:
        """Return the predicted seconds to the target with their lower and upper ends, or None if unknown.

        A prediction is the number of steps to the target times the timed step.
        """
        steps = self.steps(method, workers)
        timed = [row for row in self.timed() if (row.workers, row.rate, row.method) == (workers, rate, method.name)]
        if steps is None or not timed:
            return None
        step = timed[-1]
        return steps[0] * step.ms / 1000, steps[1] * step.low / 1000, steps[2] * step.high / 1000

    def limit(self, inner: Inner, workers: int, runs: Sequence[TargetRun] = ()) -> float | None:
        """Return the seconds that dense training with this optimizer computes until the target, without exchanges.

        The time of a step without exchanges is the mean over the blocks timed before and after `runs`, or if there are
        none, over those timed on any link. Returns None if the time or the number of steps is unknown.
        """
        dense = next((m for m in self.settings.methods if m.kind == "dense" and m.inner == inner), None)
        timed = [run.alone_ms for run in runs if run.alone_ms is not None] or [
            row.ms for row in self.timed() if (row.workers, row.method) == (workers, alone(inner).name)
        ]
        steps = self.steps(dense, workers) if dense else None
        return steps[0] * statistics.fmean(timed) / 1000 if steps and timed else None

    def _step_table(self) -> Result:
        """Return the table of timed steps on the race's links."""
        mine = [row for row in self.timed() if row.workers in self.workers and row.rate in self.rates]
        names = ("workers", "rate", "method", "ms", "low", "high", "steps")
        rows = [{name: getattr(row, name) for name in names} for row in mine]
        notes = ["ms: median over blocks of this many steps, methods in turns, of the slowest worker; then the range"]
        setting = {**self._setting(), **described([row.origin for row in mine])}
        return Result("How many milliseconds does a step take?", setting, rows, notes, digits=4)

    def _plan(self) -> Result:
        """Return the table of trainings that are still missing, with the predicted seconds of each."""
        rows = [
            {
                "workers": workers,
                "rate": jobs.rate,
                "method": training.method,
                "seed": training.seed,
                "predicted s": found[0]
                if (found := self.predicted(self.settings.method(training.method), workers, jobs.rate))
                else None,
            }
            for workers, jobs in self.missing_runs()
            for training in jobs.trainings
        ]
        if not rows:
            raise ValueError(f"out {self.folder} has all trainings of these methods, links and seeds")
        known = [row["predicted s"] for row in rows if isinstance(row["predicted s"], float)]
        note = f"{len(rows)} trainings; {len(known)} have a prediction, together {sum(known):,.0f} s of steps"
        return Result(
            "Which trainings are missing?", self._setting(), rows, [note, "empty: steps were not timed, or no row"]
        )

    def _setting(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "target": settings.target,
            "steps": settings.steps,
            "warm-up": settings.warm_up,
            "batch": settings.batch,
        }

    def _tables(self) -> list[Result]:
        """Return a table for each link on which there are trainings.

        It has the seconds of each part of the training, the predicted seconds, and the `limit` by computing alone.
        """
        found = []
        for workers in self.workers:
            for rate in self.rates:
                mine = [
                    r for r in self.trainings() if (r.workers, r.rate) == (workers, rate) and r.method in self.methods
                ]
                if mine:
                    found.append(self._table(workers, rate, mine))
        if not found:
            raise ValueError(f"out {self.folder} has no trainings of these methods and links yet")
        return found

    def _table(self, workers: int, rate: str, runs: Sequence[TargetRun]) -> Result:
        rows = [
            self._row(name, [run for run in runs if run.method == name], workers, rate)
            for name in dict.fromkeys(run.method for run in runs)
        ]
        rows.sort(key=lambda row: (row["seconds"] is None, row["seconds"] or 0.0))
        origins = [run.origin for run in runs]
        setting = {"workers": workers, "Mbit/s": rate, **self._setting(), **described(origins)}
        notes = [
            "seconds: start, steps until the loss is at the target, and flush; mean, low and high over seeds; "
            "evaluations are not timed; empty: a seed did not reach the target",
            "predicted: mean of steps, simulated (experiments/muon) or else counted, times the median step in turns; "
            "from: least steps times fastest block, to: most times slowest",
            "/ limit: seconds over computing dense training's own steps to the target with the same optimizer",
            "MB: sent by worker 0 in steps, and with start and flush; counted: by the interface, all of it",
        ]
        return Result("How many seconds until the loss is at the target?", setting, rows, notes, digits=4)

    def _row(self, name: str, runs: Sequence[TargetRun], workers: int, rate: str) -> dict[str, Any]:
        method = self.settings.method(name)
        reached = all(run.reached for run in runs)
        seconds = [run.total_s for run in runs]
        predicted = self.predicted(method, workers, rate) or (None, None, None)
        limit = self.limit(method.inner, workers, runs)
        counted = [run.counted_mb for run in runs if run.counted_mb is not None]
        mean = statistics.fmean(seconds) if reached else None
        return {
            "method": name,
            "lr": runs[0].lr,
            "seeds": len(runs),
            "seconds": mean,
            "low": min(seconds) if reached else None,
            "high": max(seconds) if reached else None,
            "start": statistics.fmean(run.start_s for run in runs),
            "flush": statistics.fmean(run.flush_s for run in runs),
            "steps": statistics.fmean(run.steps for run in runs),
            "predicted": predicted[0],
            "from": predicted[1],
            "to": predicted[2],
            "/ limit": mean / limit if mean is not None and limit else None,
            "MB in steps": statistics.fmean(run.rounds_mb for run in runs),
            "MB": statistics.fmean(run.with_ends_mb for run in runs),
            "counted": statistics.fmean(counted) if counted else None,
        }


def _on_hosts(jobs: Jobs, workers: int) -> None:
    """Run jobs with torchrun on hosts, one worker on each. Raises WorkerFailedError."""
    link = Rates.parse(jobs.rate)
    with (
        Hosts(workers, link.down, link.up) as hosts,
        tempfile.TemporaryDirectory(prefix="packsaddle-target-") as folder,
    ):
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps(asdict(jobs) | {"interface": hosts.interface, "out": str(Path(jobs.out).resolve())}))
        try:
            for line in hosts.torchrun(["-m", "lab.race.target_run", str(path)])[0].splitlines():
                print(line, flush=True)
        except HostFailedError as error:
            raise WorkerFailedError(str(error)) from None
