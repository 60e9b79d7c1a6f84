"""The file in which a worker's error memory waits while the worker is away.

It is written whole or not at all, and read with weights_only=True. A memory may be used once: what has been sent since
it was written must not be sent again. So it says whose it is, of which run, and after which of that worker's attempts
at a round it was written; whoever reads it compares that with what the others remember.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.errors import ConfigError

FORMAT = 1


@dataclass(frozen=True)
class MemoryFile:
    """A worker's error memory on disk: what it has moved and not sent, by parameter."""

    run: int  # of which run
    worker: int  # whose
    attempt: int  # the last of its attempts that was committed
    pending: Mapping[str, Tensor]  # float, shaped as the parameters
    format: int = FORMAT

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
