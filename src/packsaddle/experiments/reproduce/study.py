"""A study: settings times seeds, each a run folder of its own, so that what is done is never done again."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from packsaddle.errors import ConfigError
from packsaddle.experiments.config import Config, configure
from packsaddle.experiments.run_folder import RunFolder, commit, make_new
from packsaddle.experiments.schema import build, plain

Scale = Literal["paper", "cpu", "smoke"]
Data = Literal["mnist", "cifar10", "folder", "text"]


@dataclass(frozen=True)
class SubRun:
    """One run of a study."""

    setting: str  # its folder
    config: Config

    @property
    def name(self) -> str:
        """Its folder inside the study's `runs`."""
        return f"{self.setting}/seed-{self.config.seed}"

    def __str__(self) -> str:
        return f"run {self.name}"


@dataclass(frozen=True)
class Study:
    """The runs of a study; `settings` gives each setting's folder and configuration, whose seed is replaced."""

    name: str
    scale: Scale
    settings: dict[str, Config]
    seeds: int  # 0 ... seeds - 1

    def sub_runs(self) -> list[SubRun]:
        """All runs, seed by seed, so that a study that is cut off has every setting."""
        return [
            SubRun(name, replace(config, seed=seed))
            for seed in range(self.seeds)
            for name, config in self.settings.items()
        ]

    def changed(self, overrides: Sequence[str], seeds: int | None, only: Sequence[str]) -> "Study":
        """Return the study with `key=value` overrides in every configuration, other seeds, or some settings only.

        Raises ConfigError.
        """
        unknown = [name for name in only if name not in self.settings]
        if unknown:
            raise ConfigError(f"{self.name} has no setting {unknown[0]!r}; it has {', '.join(self.settings)}")
        if seeds is not None and seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {seeds}")
        kept = {name: config for name, config in self.settings.items() if not only or name in only}
        settings = {name: _overridden(config, overrides) for name, config in kept.items()}
        return replace(self, settings=settings, seeds=self.seeds if seeds is None else seeds)


def _overridden(config: Config, overrides: Sequence[str]) -> Config:
    return configure(plain(config), overrides) if overrides else config


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder: study.json, runs/SETTING/seed-N, and what is made of them."""

    path: Path

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.path / "runs"

    def run(self, sub_run: SubRun) -> Path:
        """A run's folder."""
        return self.runs / sub_run.name

    def check(self, study: Study, *, resume: bool) -> None:
        """Raise ConfigError if the folder is there, unless it is this study's and is to be continued."""
        if self.path.exists() and resume:
            self._check(study)
        elif self.path.exists():
            raise ConfigError(f"output folder {self.path} exists; continue it with --resume, or choose another --out")

    def make(self, study: Study) -> None:
        """Make the folder if it is not there. Raises ConfigError if it cannot be made."""
        if not self.path.exists():
            make_new(self.path)
            RunFolder(self.path).write_json("study.json", {**_identity(study), "commit": commit()})

    def _check(self, study: Study) -> None:
        try:
            found = json.loads((self.path / "study.json").read_text())
            found = {key: found[key] for key in _identity(study)}
        except (OSError, ValueError, KeyError, TypeError):
            raise ConfigError(f"--resume: {self.path} is not the folder of a study (no readable study.json)") from None
        if found != _identity(study):
            wanted = f"{study.name} at scale {study.scale}"
            raise ConfigError(f"--resume: {self.path} holds {found['study']} at scale {found['scale']}, not {wanted}")
        for sub_run in study.sub_runs():
            if self.is_done(sub_run) and self._config_of(sub_run) != sub_run.config:
                raise ConfigError(f"--resume: {self.run(sub_run)} was made with another configuration")

    def _config_of(self, sub_run: SubRun) -> Config | None:
        """The configuration in a run's folder, keys that are newer than it at their defaults."""
        try:
            return build(Config, json.loads((self.run(sub_run) / "config.json").read_text()))
        except (OSError, ValueError):
            return None

    def is_done(self, sub_run: SubRun) -> bool:
        """Tell if a run has been finished (its summary comes last)."""
        return (self.run(sub_run) / "summary.json").is_file()

    def is_begun(self, sub_run: SubRun) -> bool:
        """Tell if there is something of this run to continue."""
        return self._config_of(sub_run) == sub_run.config

    def missing(self, sub_runs: Iterable[SubRun]) -> list[SubRun]:
        """Those that are still to be done."""
        return [sub_run for sub_run in sub_runs if not self.is_done(sub_run)]

    def progress(self, sub_run: SubRun) -> float:
        """The share of a run that is done, by the epochs in its metrics."""
        if self.is_done(sub_run):
            return 1.0
        try:
            with (self.run(sub_run) / "metrics.jsonl").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 65536))
                last = [line for line in file.read().split(b"\n")[:-1] if line][-1]
            return min(1.0, float(json.loads(last)["epoch"]) / sub_run.config.epochs)
        except (OSError, IndexError, ValueError, KeyError):
            return 0.0


def _identity(study: Study) -> dict[str, Any]:
    return {"study": study.name, "scale": study.scale}
