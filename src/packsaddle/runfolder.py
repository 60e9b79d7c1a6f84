"""A run's folder: config.json, environment.json, metrics.jsonl, summary.json and checkpoint/; where certificates were
asked for, certificates.jsonl and iterates/.

A folder is made once and never overwritten. Every file but the .jsonl, which grow line by line, is written
aside and renamed, so that a reader or a crash never finds half of one. summary.json appears when the run is done.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import torch

from packsaddle.durable import write_whole
from packsaddle.recorded import read_lines, read_object
from packsaddle.schema import ConfigError
from packsaddle.wording import printable


class RunFolder:
    """The writing end, for rank 0 (and for each worker's part of the checkpoint)."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self) -> None:
        """Make the folder. Raises ConfigError if it exists or cannot be made; nothing is touched then."""
        make_new(self.path)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        self._replace(name, lambda file: file.write(json.dumps(content, indent=2, allow_nan=True).encode() + b"\n"))

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Add one line to a .jsonl file."""
        with (self.path / name).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def settle(self) -> None:
        """Have the .jsonl files reach the disk, before a checkpoint says that they are there. Raises OSError."""
        for path in self.path.glob("*.jsonl"):
            with path.open("rb") as file:
                os.fsync(file.fileno())

    def cut(self, step: int) -> None:
        """Cut the .jsonl files back to what they were when `step` steps were done. Raises ConfigError if damaged."""
        for name, last in (("metrics.jsonl", step), ("certificates.jsonl", step - 1)):
            path = self.path / name
            if path.exists():
                try:
                    lines = [line for line in read_lines(path) if line["step"] <= last]
                except (ConfigError, KeyError, TypeError) as error:
                    raise ConfigError(f"{path} is damaged: {error}") from None
                text = "".join(json.dumps(line) + "\n" for line in lines).encode()
                if text != path.read_bytes():
                    self._replace(name, partial(_write, text))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def save_tensors(self, name: str, content: Mapping[str, Any]) -> None:
        """Write tensors and plain types atomically, to be read with torch.load(weights_only=True)."""
        self._replace(name, lambda file: torch.save(content, file))

    def _replace(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        write_whole(self.path / name, write)


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def make_new(path: Path) -> None:
    """Make a folder that must not exist yet, with its parents. Raises ConfigError."""
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"output folder {path} exists already; choose another with --out") from None
    except OSError as error:
        raise ConfigError(f"output folder {path} cannot be made: {error.strerror}") from None


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Raise ConfigError where the system refuses to write into a folder: its disk is full, or read-only."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise ConfigError(f"{folder} cannot be written: {what}; what it holds so far stays readable") from None


@cache
def commit() -> str | None:
    """The commit of the code that runs, with "+" if files differ from it; None outside a checkout of packsaddle."""
    here = Path(__file__)

    def git(*arguments: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", here.parent, *arguments], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return answer.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None
    head, changes = git("rev-parse", "--short=12", "HEAD"), git("status", "--porcelain", "--", ".")
    return None if head is None else head + ("+" if changes else "")


def environment(version: str, workers: int, device: str) -> dict[str, Any]:
    """Describe what a run ran on."""
    return {
        "packsaddle": version,
        "commit": commit(),
        "command": shlex.join(["packsaddle", *sys.argv[1:]]),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or device,
        "workers": workers,
    }


@dataclass(frozen=True)
class Run:
    """The reading end: what a run left in its folder."""

    path: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None  # None: the run has not finished
    certificates: list[dict[str, Any]]  # along the run, as `Certificate.to_dict` gives them, with step and epoch

    @property
    def label(self) -> str:
        """The run's name in tables and figures: as configured, or its folder's (of SETTING/seed-N: SETTING).

        Control characters in it are shown as escapes.
        """
        folder = self.path.absolute()
        inner = folder.parent.name if re.fullmatch(r"seed-\d+", folder.name) else folder.name
        return printable(str(self.config.get("label") or inner))


_DEPTHS = ("*", "*/*", "*/*/*")  # of runs in a folder: beside each other, by setting and seed, in a study's runs/


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run folders, or folders that hold run folders, up to a study's runs/SETTING/seed-N.

    Runs beside each other in a folder come in order of time, those further down by path, seed 2 before seed 10.
    Raises ConfigError that names what is not a run folder and holds none.
    """
    runs = []
    for path in paths:
        if (path / "config.json").is_file():
            runs.append(_read_run(path))
            continue
        inside = [p.parent for depth in _DEPTHS for p in path.glob(f"{depth}/config.json")] if path.is_dir() else []
        if not inside:
            raise ConfigError(f"{path} is not a run folder (it has no config.json) and holds none")
        flat = all(run.parent == path for run in inside)
        order: Callable[[Path], Any] = (lambda run: run.stat().st_mtime_ns) if flat else _natural
        runs += map(_read_run, sorted(inside, key=order))
    return runs


def _natural(path: Path) -> list[list[str | int]]:
    """A key that sorts numbers within names by value."""
    return [[int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", part)] for part in path.parts]


def _read_run(path: Path) -> Run:
    try:
        return Run(
            path,
            read_object(path / "config.json"),
            read_object(path / "environment.json"),
            read_lines(path / "metrics.jsonl"),
            read_object(path / "summary.json") if (path / "summary.json").exists() else None,
            read_lines(path / "certificates.jsonl"),
        )
    except ConfigError as error:
        raise damaged(path, error) from None


def damaged(path: Path, error: ConfigError) -> ConfigError:
    """Return the error to raise for a run folder that cannot be read, which says so if another version wrote it."""
    import packsaddle

    try:
        version = read_object(path / "environment.json").get("packsaddle") or packsaddle.__version__
    except ConfigError:
        version = packsaddle.__version__
    other = f" (packsaddle {version} wrote it, and this is {packsaddle.__version__})"
    return ConfigError(f"run folder {path} is damaged{other * (version != packsaddle.__version__)}: {error}")
