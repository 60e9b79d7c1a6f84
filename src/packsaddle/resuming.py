"""A run folder that is to be begun or gone on with, whatever has become of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from packsaddle.config import Config
from packsaddle.durable import PARTIAL
from packsaddle.folderlock import LOCK
from packsaddle.schema import ConfigError, build, plain

State = Literal["new", "begun", "done"]


def find(path: Path, config: Config | None) -> tuple[Config, State]:
    """Return a run's configuration, and how far it is. `config` is that of the command, if it has one.

    Raises ConfigError if the folder is something else, or has another configuration but for the number of workers.
    """
    state = state_of(path)
    if state == "new":
        if config is None:
            raise ConfigError(
                f"--resume: {path} is not a run folder (it has no config.json); to begin one, give CONFIG"
            )
        return config, state
    saved = _saved(path)
    if config is not None:
        _compare(config, saved, path)
    return saved, state


def state_of(path: Path) -> State:
    """How far the run in a folder is. Raises ConfigError if there is something else in it."""
    if (path / "config.json").is_file():
        return "done" if (path / "summary.json").is_file() else "begun"
    others = (
        [p.name for p in path.iterdir() if p.name != LOCK and not p.name.endswith(PARTIAL)] if path.is_dir() else []
    )
    if others or (path.exists() and not path.is_dir()):
        raise ConfigError(f"--resume: {path} is not a run folder (it has no config.json), and not empty")
    return "new"


def _saved(path: Path) -> Config:
    try:
        return build(Config, json.loads((path / "config.json").read_text()))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--resume: {path / 'config.json'} cannot be read: {error}") from None


def _compare(given: Config, saved: Config, path: Path) -> None:
    different = first_difference(plain(given), plain(saved))
    if different is not None:
        key, ours, theirs = different
        raise ConfigError(f"--resume: {key} is {ours!r} in CONFIG, but {theirs!r} in {path / 'config.json'}")


def first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str = ""
) -> tuple[str, Any, Any] | None:
    """Return the first dotted key that differs, but for workers, and its two values."""
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if a == b or (where + key) == "workers":
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return first_difference(a, b, f"{where}{key}.")
        return where + key, a, b
    return None
