"""A run's folder: config.json, environment.json, metrics.jsonl, summary.json and checkpoint/.

With [certify] it also has certificates.jsonl and iterates/. A folder is created once and never overwritten. All files
are written atomically, except the .jsonl files, which grow line by line. summary.json is written when the run is done.

Unknown fields are accepted on reading, so that folders of other versions can be read.
"""

import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from lab.origin import commit
from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.errors import ConfigError, read_text
from packsaddle.messages import printable, shown
from packsaddle.numerics.devices import accelerators
from packsaddle.version import __version__


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of a run folder. Raises ConfigError, which names the file, if it is invalid."""
    return _parsed(read_text(path, path.name), path.name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON lines in a file of a run folder; returns [] if the file does not exist.

    An incomplete last line, which a killed process leaves, is ignored. Raises ConfigError, which names the line, if
    another line is invalid.
    """
    lines = read_text(path, path.name).splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_parsed(line, f"{path.name}, line {number}"))
        except ConfigError:
            if number < len(lines):
                raise
    return found


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{where} must be a JSON object, got {shown(found)}")
    return found


class RunFolder:
    """Writer of the files in a run folder. It is used by rank 0, and by each worker for its own file in checkpoint/."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, json.dumps(content, indent=2).encode() + b"\n")

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def flush(self) -> None:
        """Flush the .jsonl files to disk (fsync). Call before saving a checkpoint. Raises OSError."""
        for path in self.path.glob("*.jsonl"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Truncate the .jsonl files to the lines of the first `step` steps. Raises ConfigError if a file is damaged."""
        for name, last in (("metrics.jsonl", step), ("certificates.jsonl", step - 1)):
            path = self.path / name
            if path.exists():
                try:
                    lines = [line for line in read_lines(path) if line["step"] <= last]
                except (ConfigError, KeyError, TypeError) as error:
                    raise ConfigError(f"{path} is damaged: {error}") from None
                text = "".join(json.dumps(line) + "\n" for line in lines).encode()
                if text != path.read_bytes():
                    self._write(name, text)

    def save_tensors(self, name: str, content: Mapping[str, Any]) -> None:
        """Write tensors and plain types atomically, to be read with torch.load(weights_only=True)."""
        write_whole(self.path / name, lambda file: torch.save(content, file))

    def _write(self, name: str, content: bytes) -> None:
        write_whole(self.path / name, lambda file: file.write(content))


def environment(version: str, workers: int, device: str) -> dict[str, Any]:
    """Return the versions, command, start (UTC) and hardware of this run, for environment.json."""
    return {
        "packsaddle": version,
        "commit": commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "lab", *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": accelerators().get(device) or platform.processor() or device,
        "workers": workers,
    }


@dataclass(frozen=True)
class Run:
    """The content of a run folder, as read from its files."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None: the run has not finished
    certificates: list[dict[str, Any]]  # certificates along the run: `Certificate.to_dict()` with step and epoch

    @property
    def label(self) -> str:
        """The configured label, or if there is none the folder's name, with control characters escaped.

        For a study's folder SETTING/seed-N the name is SETTING.
        """
        folder = self.path.absolute()
        inner = folder.parent.name if re.fullmatch(r"seed-\d+", folder.name) else folder.name
        return printable(str(self.config.get("label") or inner))


# Patterns of run folders inside a folder: RUN, or SETTING/seed-N and runs/SETTING/seed-N in a study's folder.
_DEPTHS = ("*", "*/*", "*/*/*")


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, and folders that contain run folders, such as a study's folder with runs/SETTING/seed-N.

    Runs directly in a folder are sorted by modification time, deeper ones by path, with seed-2 before seed-10.
    Duplicates are read once. Raises ConfigError for a path that neither is nor contains a run folder.
    """
    found: dict[Path, Path] = {}  # keys are resolved paths, since several paths can lead to one folder
    for path in paths:
        if (path / "config.json").is_file():
            found.setdefault(path.resolve(), path)
            continue
        inside = [p.parent for depth in _DEPTHS for p in path.glob(f"{depth}/config.json")] if path.is_dir() else []
        if not inside:
            raise ConfigError(f"{path} is not a run folder (it has no config.json) and contains none")
        flat = all(run.parent == path for run in inside)
        order: Callable[[Path], Any] = (lambda run: run.stat().st_mtime_ns) if flat else _natural
        for run in sorted(inside, key=order):
            found.setdefault(run.resolve(), run)

    # Read the files of each folder.
    runs = []
    for path in found.values():
        try:
            config, here = read_object(path / "config.json"), read_object(path / "environment.json")
            metrics = read_lines(path / "metrics.jsonl")
            summary = read_object(path / "summary.json") if (path / "summary.json").exists() else None
            certificates = read_lines(path / "certificates.jsonl")
        except ConfigError as error:
            raise damaged(path, error) from None
        runs.append(Run(path, config, here, metrics, summary, certificates))
    return runs


def _natural(path: Path) -> list[list[str | int]]:
    return [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in path.parts]


def damaged(path: Path, error: ConfigError) -> ConfigError:
    """Return the error to raise for an unreadable run folder; it says if another version wrote the folder."""
    try:
        version = read_object(path / "environment.json").get("packsaddle") or __version__
    except ConfigError:
        version = __version__
    other = f" (packsaddle {version} wrote it, and this is {__version__})"
    return ConfigError(f"run folder {path} is damaged{other * (version != __version__)}: {error}")
