"""A study: runs of several settings, each with several seeds.

Every run has its own folder, so a resumed study skips its finished runs.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lab.origin import commit
from lab.runs import Config, RunFolder, configure, make_new, override
from lab.runs.config import first_difference
from packsaddle.errors import ConfigError
from packsaddle.options import build, plain

Scale = Literal["paper", "cpu", "smoke"]
Data = Literal["mnist", "cifar10", "folder", "text"]


@dataclass(frozen=True)
class SubRun:
    """One run of a study: a setting with one seed."""

    setting: str  # name of the setting's folder
    config: Config

    @property
    def name(self) -> str:
        """The path of the run's folder inside the study's folder `runs`."""
        return f"{self.setting}/seed-{self.config.seed}"

    def __str__(self) -> str:
        return f"run {self.name}"


@dataclass(frozen=True)
class Study:
    """The settings and the number of seeds of a study.

    `settings` maps the name of each setting's folder to its configuration; the seed in it is replaced for each run.
    """

    name: str
    scale: Scale
    settings: dict[str, Config]
    seeds: int  # number of seeds, which are 0 ... seeds - 1

    def sub_runs(self) -> list[SubRun]:
        """Return all runs, ordered by seed, so that an interrupted study has runs of every setting."""
        return [
            SubRun(name, replace(config, seed=seed))
            for seed in range(self.seeds)
            for name, config in self.settings.items()
        ]

    def changed(self, overrides: Sequence[str], seeds: int | None, only: Sequence[str]) -> "Study":
        """Return the study with `key=value` overrides in every configuration, and with some settings only.

        `seeds` replaces the number of seeds, unless it is None. If `only` is empty, all settings are kept. Raises
        ConfigError for an unknown setting or an invalid override.
        """
        unknown = [name for name in only if name not in self.settings]
        if unknown:
            raise ConfigError(f"{self.name} has no setting {unknown[0]!r}; it has {', '.join(self.settings)}")
        if seeds is not None and seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {seeds}")
        kept = {name: config for name, config in self.settings.items() if not only or name in only}
        told = [text for text in overrides if self._varies(text, kept)]
        settings = {name: _overridden(config, overrides, told) for name, config in kept.items()}
        return replace(self, settings=settings, seeds=self.seeds if seeds is None else seeds)

    def _varies(self, text: str, kept: Mapping[str, Config]) -> bool:
        """Return True if the study's settings differ in the key of an override.

        Raises ConfigError if the settings in `kept` differ in it, since the override would remove that difference.
        """
        key = override({}, text)
        if key[0] in ("seed", "label"):
            instead = "choose how many with --seeds" if key[0] == "seed" else "they name its settings"
            raise ConfigError(f"--set {text}: a study has {key[0]}s of its own; {instead}")
        first, value = next((name, _value(config, key)) for name, config in kept.items())
        for name, config in kept.items():
            if (other := _value(config, key)) != value:
                raise ConfigError(
                    f"--set {text}: {'.'.join(key)} is what settings differ in, {value!r} in {first} and {other!r} in "
                    f"{name}; choose those with one value by --only"
                )
        return any(_value(config, key) != value for config in self.settings.values())


def _value(config: Config, key: Sequence[str]) -> Any:
    """Return the value of a configuration at a dotted key, split into names; None if it has no such key."""
    found: Any = plain(config)
    for name in key:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _overridden(config: Config, overrides: Sequence[str], told: Sequence[str]) -> Config:
    """Return the configuration with overrides; its label names those in `told`.

    If the number of epochs changes, the epochs of the noise schedule and of certificates are scaled with it.
    """
    if not overrides:
        return config
    changed = configure(plain(config), overrides)
    share, noise, certify = changed.epochs / config.epochs, changed.noise, changed.certify
    if share != 1:
        before = {name: getattr(config.noise, name) for name in ("lower_from", "lower_until")}
        kept = {name: epoch for name, epoch in before.items() if epoch is not None and epoch == getattr(noise, name)}
        try:
            noise = replace(noise, **{name: share * epoch for name, epoch in kept.items()})
        except ValueError as error:
            raise ConfigError(f"--set {' '.join(overrides)}: noise: {error}") from None
        if certify is not None and config.certify is not None and certify.at == config.certify.at:
            certify = replace(certify, at=tuple(share * epoch for epoch in certify.at))
    label = f"{changed.label} ({', '.join(told)})" if told else changed.label
    return replace(changed, noise=noise, certify=certify, label=label)


def check_folder(path: Path, name: str, scale: Scale, *, resume: bool) -> None:
    """Raise ConfigError if a study's folder exists, unless `resume` is True and it belongs to this study and scale."""
    if not path.exists():
        return
    if not resume:
        raise ConfigError(f"output folder {path} exists; continue it with --resume, or choose another --out")
    try:
        found = json.loads((path / "study.json").read_text())
        there = found["study"], found["scale"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"--resume: {path} is not the folder of a study (no readable study.json)") from None
    if there != (name, scale):
        raise ConfigError(f"--resume: {path} holds {there[0]} at scale {there[1]}, not {name} at scale {scale}")


def make_folder(path: Path, name: str, scale: Scale) -> None:
    """Create a study's folder if it does not exist. Raises ConfigError if it cannot be created."""
    if not path.exists():
        make_new(path)
        RunFolder(path).write_json("study.json", {"study": name, "scale": scale, "commit": commit()})


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder: study.json, the runs in runs/SETTING/seed-N, and the results made from the runs."""

    path: Path

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.path / "runs"

    def run(self, sub_run: SubRun) -> Path:
        """Return the folder of a run."""
        return self.runs / sub_run.name

    def check(self, study: Study, *, resume: bool) -> None:
        """Raise ConfigError if the folder exists, unless `resume` is True and its runs belong to this study.

        A run belongs to the study if its configuration is unchanged.
        """
        check_folder(self.path, study.name, study.scale, resume=resume)
        for sub_run in study.sub_runs():
            there = self._config_of(sub_run)
            if there is None and not self.is_done(sub_run):
                continue  # this run has not begun
            if there != sub_run.config:
                known = {} if there is None else plain(there)
                workers = "workers", sub_run.config.workers, known.get("workers")
                key, now, before = first_difference(plain(sub_run.config), known) or workers
                raise ConfigError(
                    f"--resume: {self.run(sub_run)} was made with another configuration: {key} was {before!r}, and is "
                    f"{now!r}"
                )

    def make(self, study: Study) -> None:
        """Create the study's folder if it does not exist. Raises ConfigError if it cannot be created."""
        make_folder(self.path, study.name, study.scale)

    def _config_of(self, sub_run: SubRun) -> Config | None:
        """Return the configuration in a run's folder, or None if it cannot be read.

        Keys that did not exist when the run was made have their defaults.
        """
        try:
            return build(Config, json.loads((self.run(sub_run) / "config.json").read_text()))
        except (OSError, ValueError):
            return None

    def is_done(self, sub_run: SubRun) -> bool:
        """Return True if a run is finished: its summary exists, which is written last."""
        return (self.run(sub_run) / "summary.json").is_file()

    def is_begun(self, sub_run: SubRun) -> bool:
        """Return True if a run has begun with the same configuration, so that it can be resumed."""
        return self._config_of(sub_run) == sub_run.config

    def missing(self, sub_runs: Iterable[SubRun]) -> list[SubRun]:
        """Return the runs that are not finished."""
        return [sub_run for sub_run in sub_runs if not self.is_done(sub_run)]
