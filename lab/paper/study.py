"""What the studies share: their options, and their runs in parallel with one file for each run that is done.

A study is a script with its data, its model, its training loop and its chart: `figure1`, `figure2` and `language`. A
run is one setting with one seed. The script's `train` does one run and returns its rows, one for each measurement.
`lab.paper.results` makes the summary, the curves and the figure from the rows.
"""

import csv
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from lab.origin import commit
from lab.pool import Report, in_parallel
from packsaddle import Ledger
from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.cli.folders import make_new, written
from packsaddle.compressors import (
    QSGD,
    AdaptiveTopK,
    Compressor,
    LinearSketch,
    LowRank,
    RandomK,
    SharedTopK,
    Sign,
    SketchTopK,
    TopK,
)
from packsaddle.errors import ConfigError, check_counts, require
from packsaddle.options.schema import nearest

Scale = Literal["paper", "cpu", "smoke"]
Row = dict[str, Any]  # numbers and words by column; None: not measured
S = TypeVar("S")
# Nine lossy compressors that several studies compare, by short names, with their names in figures.
NINE: dict[str, tuple[str, Compressor]] = {
    "randomk": ("RandomK 1%", RandomK(0.01)),
    "topk": ("TopK 1%", TopK(0.01)),
    "adaptive": ("AdaptiveTopK 50%", AdaptiveTopK(0.5)),
    "shared": ("SharedTopK 1%", SharedTopK(0.01)),
    "sketch": ("SketchTopK 1%", SketchTopK(0.01)),
    "linear-sketch": ("LinearSketch 1%", LinearSketch(0.01)),
    "sign": ("Sign", Sign()),
    "qsgd": ("QSGD", QSGD()),
    "lowrank": ("LowRank 1", LowRank()),
}


@dataclass(frozen=True)
class Options:
    """The options of every study."""

    # paper: the paper's setting; cpu: the largest that two cores do in about 90 minutes; smoke: a minute
    scale: Scale = "cpu"
    # A new folder for the runs and what is made of them; by default one under runs/ named by the time
    out: Path | None = None
    # Go on in the folder --out: runs that are done are kept
    resume: bool = False
    # Runs at once; by default one per core, on a GPU one
    jobs: int | None = None
    # How many seeds per setting, instead of the scale's
    seeds: int | None = None
    # Settings to run, by name; by default all
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_counts(jobs=self.jobs, seeds=self.seeds)
        if self.resume and self.out is None:
            raise ConfigError("--resume needs --out, the folder of the study to continue")

    def chosen(self, settings: Mapping[str, S]) -> dict[str, S]:
        """Return the settings that `only` names, or all. Raises ConfigError for an unknown name."""
        for name in self.only:
            if name not in settings:
                names = ", ".join(settings)
                raise ConfigError(f"--only must name some of {names}, got {name!r}{nearest(name, list(settings))}")
        return {name: setting for name, setting in settings.items() if not self.only or name in self.only}

    def folder(self, study: str, settings: Mapping[str, Any]) -> Path:
        """Return the folder of a study, which is created, or with `resume` continued.

        Its file study.json has the settings and how they are run. Raises ConfigError if the folder exists without
        `resume`, or was made by another study, at another scale, or with other settings of the same names.
        """
        require("matplotlib", "lab", f"the figure of {study}")  # before the runs, so that none is lost
        path = self.out or Path("runs") / f"{study}-{datetime.now():%Y%m%d-%H%M%S}"
        given = {name: repr(setting) for name, setting in settings.items()}
        words = ["python", *sys.orig_argv[1:]]
        machine = {"torch": torch.__version__, "python": sys.version.split()[0], "cpus": os.cpu_count()}
        made = [{"commit": commit(), "command": shlex.join(words), **machine}]
        if not path.exists():
            make_new(path)
        elif not self.resume:
            raise ConfigError(f"output folder {path} exists; continue it with --resume, or choose another --out")
        else:
            # Runs that are done must be of the same study and settings.
            try:
                found = json.loads((path / "study.json").read_text())
                there, known = (found["study"], found["scale"]), dict(found["settings"])
                made = [*found["made"], *made]
            except (OSError, ValueError, KeyError, TypeError):
                raise ConfigError(f"--resume: {path} is not the folder of a study (no readable study.json)") from None
            if there != (study, self.scale):
                raise ConfigError(f"--resume: {path} holds {there[0]} at scale {there[1]}, not {study} at {self.scale}")
            for name, setting in given.items():
                if known.get(name, setting) != setting:
                    raise ConfigError(f"--resume: {name} in {path} was {known[name]}, and is {setting}")
            given = known | given
        write_json(path / "study.json", {"study": study, "scale": self.scale, "settings": given, "made": made})
        return path


@dataclass(frozen=True)
class Run(Generic[S]):
    """One run of a study."""

    name: str  # the setting's name
    setting: S
    seed: int
    study: Path  # folder of the study

    def __str__(self) -> str:
        return f"run {self.name}, seed {self.seed}"

    @property
    def file(self) -> Path:
        """The run's rows. The file exists if the run is done."""
        return self.study / "runs" / f"{self.name}-seed-{self.seed}.csv"

    @property
    def checkpoints(self) -> Path:
        """Folder for the checkpoints of a long run; it is empty when the run is done."""
        return self.study / "checkpoints" / f"{self.name}-seed-{self.seed}"

    def rows(self) -> list[Row]:
        """Return the rows of a run that is done. Numbers are floats."""
        with self.file.open(newline="", encoding="utf-8") as file:
            return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def do_runs(
    study: str,
    settings: Mapping[str, S],
    train: Callable[[Run[S], Report], Sequence[Row]],
    seeds: int,
    options: Options,
) -> list[Run[S]]:
    """Do the runs of a study that are not done, several at once, and return all runs.

    They are ordered by seed, so that an interrupted study has runs of every setting. `train` must be importable by
    name, or a `functools.partial` of such a function.
    """
    kept = options.chosen(settings)
    folder = options.folder(study, kept)
    count = seeds if options.seeds is None else options.seeds
    runs = [Run(name, setting, seed, folder) for seed in range(count) for name, setting in kept.items()]
    missing = [run for run in runs if not run.file.exists()]
    with written(folder):
        (folder / "runs").mkdir(exist_ok=True)
        for _ in in_parallel(partial(_do, train), missing, study, options.jobs):
            pass
    return runs


def _do(train: Callable[[Run[S], Report], Sequence[Row]], run: Run[S], report: Report) -> None:
    rows = train(run, report)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(run.file, lambda file: file.write(text.getvalue().encode()))


def _value(cell: str) -> float | str | None:
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))


class Measurements:
    """The measurements of one worker's run: a row for every `every` steps, and at the last step.

    A row has the means, over the steps since the last row, of the loss and of the norm of this worker's gradient.
    """

    def __init__(self, steps: int, per_epoch: int, every: int, ledger: Ledger) -> None:
        self.rows: list[Row] = []
        self._steps, self._per_epoch, self._every, self._ledger = steps, per_epoch, every, ledger
        self._losses, self._norms, self._last_epoch = list[float](), list[float](), list[float]()
        self._begin, self._paused = time.perf_counter(), 0.0

    def add(self, step: int, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Add the loss and the gradients of step `step`, which is counted from 1."""
        self._losses.append(float(loss.detach()))
        self._norms.append(float(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])))
        if step > self._steps - self._per_epoch:
            self._last_epoch.append(self._losses[-1])

    def row(self, step: int) -> Row | None:
        """Return a new row if one is due after step `step`, otherwise None. The caller may add to it.

        `megabytes` is what this worker has sent since its start; a single worker sends nothing, so its messages are
        counted. The last row also has `final_loss`, the mean loss of the last epoch.
        """
        if step % self._every and step < self._steps:
            return None
        moved = [one for purpose, one in self._ledger.by_purpose.items() if purpose != "start"]
        row: Row = {
            "step": step,
            "epoch": step / self._per_epoch,
            "megabytes": (sum(one.sent for one in moved) or sum(one.payload for one in moved)) / 1e6,
            "seconds": time.perf_counter() - self._begin - self._paused,
            "loss": fmean(self._losses),
            "grad_norm": fmean(self._norms),
        }
        if step == self._steps:
            row["final_loss"] = fmean(self._last_epoch)
        self._losses, self._norms = [], []
        self.rows.append(row)
        return row

    def state_dict(self) -> dict[str, Any]:
        """Return the state after a row, for a checkpoint."""
        seconds = time.perf_counter() - self._begin - self._paused
        return {"rows": self.rows, "last_epoch": self._last_epoch, "seconds": seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.rows, self._last_epoch = list(state["rows"]), list(state["last_epoch"])
        self._begin, self._paused = time.perf_counter() - state["seconds"], 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager whose time is not counted in `seconds`, for tests and certificates."""
        begin = time.perf_counter()
        yield
        self._paused += time.perf_counter() - begin


def mean_over_workers(workers: Sequence[Sequence[Row]]) -> list[Row]:
    """Return the rows of worker 0, with the means over workers of losses and norms."""
    averaged = ("loss", "grad_norm", "final_loss")
    return [
        {name: fmean(row[name] for row in same) if name in averaged else value for name, value in same[0].items()}
        for same in zip(*workers, strict=True)
    ]
