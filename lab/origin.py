"""The origin of a measured row: machine, versions, date, commit, and text of the training."""

import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import torch

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Origin:
    """Columns of a row that state how it was made. A value that was not recorded is "", or 0 for `threads`."""

    machine: str = ""  # processor and number of logical cores
    torch: str = ""  # torch's version
    threads: int = 0  # number of torch's threads per worker
    date: str = ""  # date in UTC, such as 2026-11-28
    commit: str = ""  # commit of this repository, with "+" if its code had uncommitted changes
    text: str = ""  # first 12 digits of the SHA-256 of the training text; empty also for other data

    @classmethod
    def here(cls, *, threads: int | None = None, text: str = "") -> "Origin":
        """Return the origin of a row that is made now on this machine; `threads` None: torch's current number."""
        count = torch.get_num_threads() if threads is None else threads
        return cls(cpu_model(), torch.__version__, count, f"{datetime.now(UTC):%Y-%m-%d}", commit() or "", text)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> "Origin":
        """Return the origin stated in a CSV row. Raises ValueError if `threads` is not a number."""
        words: dict[str, Any] = {field.name: row.get(field.name) or "" for field in fields(cls)}
        return cls(**{**words, "threads": int(words["threads"] or 0)})


UNKNOWN = Origin()  # the origin of rows that were made before origins were recorded


def described(origins: Iterable[Origin]) -> dict[str, str]:
    """Return the machines and torch versions on which rows were made, for the printed setting of a table.

    They may differ from the machine that prints the table.
    """
    made = list(origins)
    return {
        name: "; ".join(sorted({getattr(origin, name) or NOT_RECORDED for origin in made}))
        for name in ("machine", "torch")
    }


def check_text(origins: Iterable[Origin], text: str, where: object) -> None:
    """Raise ValueError if a row was trained on a text whose hash is not `text`. Rows without a hash are accepted."""
    others = sorted({origin.text for origin in origins} - {"", text})
    if others:
        raise ValueError(f"{where} must have rows of one text, {text}, got {', '.join(others)}: use another file")


def cpu_model() -> str:
    """Return the processor's name and the number of logical cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} logical cores" if names else platform.machine()


@cache
def commit() -> str | None:
    """Return the commit of the running code, with "+" if the package or the lab has changes; None without git."""
    # Without optional locks, git leaves no lock file if it is killed.
    git = ["git", "--no-optional-locks", "-C", str(Path(__file__).parents[1])]
    try:
        head, changes = (
            subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "--", "src", "lab"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")
