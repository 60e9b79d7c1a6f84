"""The file in which a worker's error memory waits while the worker is away.

It is written whole or not at all, and read with weights_only=True. A memory may be used once: what has been sent since
it was written must not be sent again. So it says whose it is, of which run, and after which of that worker's attempts
at a round it was written, and `claim` compares that with what the others remember.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.errors import ConfigError
from packsaddle.optim.roster import Roster

_log = logging.getLogger("packsaddle")
FORMAT = 1


@dataclass(frozen=True)
class MemoryFile:
    """A worker's error memory on disk: what it has moved and not sent, by parameter."""

    run: int  # of which run
    worker: int  # whose
    attempt: int  # the last of its attempts that was committed
    pending: Mapping[str, Tensor]  # float, shaped as the parameters
    format: int = FORMAT

    @property
    def norm(self) -> float:
        """The norm of the whole memory."""
        return math.sqrt(sum(float(error.double().square().sum()) for error in self.pending.values()))

    def write(self, path: Path) -> None:
        """Write it in place of what was there. Raises OSError."""
        write_whole(path, lambda file: torch.save(vars(self), file))

    @classmethod
    def read(cls, path: Path, shapes: Mapping[str, torch.Size]) -> "MemoryFile":
        """Read a file. Raises ConfigError, in one line, if it cannot be read or is of other parameters."""
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what unpickling brings
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"the memory in {path} cannot be read: {reason}") from None
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            have = found.get("format") if isinstance(found, dict) else type(found).__name__
            raise ConfigError(f"the memory in {path} has format {have}, and this version of packsaddle reads {FORMAT}")
        if found.keys() != {field.name for field in fields(cls)}:
            raise ConfigError(f"the memory in {path} is damaged: it lacks or has other entries")
        memory = cls(**found)
        if {name: tensor.shape for name, tensor in memory.pending.items()} != dict(shapes):
            raise ConfigError(f"the memory in {path} is of other parameters")
        return memory


def set_aside(path: Path) -> Path:
    """Rename a file that cannot be used, so that nothing overwrites it; return its new name."""
    aside = path.with_name(path.name + ".unusable")
    path.replace(aside)
    return aside


def claim(path: Path, shapes: Mapping[str, torch.Size], roster: Roster) -> tuple[MemoryFile | None, float]:
    """Return the memory that waits in a file, if it has not been sent since it was written, and the norm of a lost one.

    A file that cannot be used, is of another run, or is older than what its worker has sent since, is set aside with a
    line in the log. Only the last of these is a loss of this run's.
    """
    if not path.exists():
        return None, 0.0
    try:
        found = MemoryFile.read(path, shapes)
    except ConfigError as error:
        _log.warning("%s; it is set aside as %s", error, set_aside(path))
        return None, 0.0
    if found.run == roster.run and roster.taken.get(found.worker, 0) == found.attempt:
        return found, 0.0
    why = "of another run" if found.run != roster.run else "older than what its worker has sent since"
    aside = set_aside(path)
    _log.warning("the memory in %s, of norm %.3g, is %s; it is set aside as %s", path, found.norm, why, aside)
    return None, found.norm if found.run == roster.run else 0.0
