"""The origin of a measured row: machine, versions, date, commit, and text of the training."""

import platform
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import torch


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
