"""The error memory with which a worker returns, in its own file.

The file is written whole or not at all, and read with weights_only=True. A memory may be used once: updates that were
sent after it was written must not be sent again. So it names its worker, its run and the last of that worker's attempts
at a round, and `OwnFile.claim` compares them with the others' roster. An `OwnFile` is locked by its worker.
"""

import logging
import math
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.checkpoint.atomic_files import write_whole
from packsaddle.checkpoint.file_lock import HeldError, NoLocksError, acquire, release_everywhere
from packsaddle.errors import ConfigError
from packsaddle.feedback.state import FORMAT, check_format
from packsaddle.local.elastic.roster import Roster

_log = logging.getLogger("packsaddle")


@dataclass(frozen=True)
class MemoryFile:
    """A worker's error memory on disk: its unsent updates, by parameter."""

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
        """Write the memory in place of an earlier file. Raises OSError."""
        write_whole(path, lambda file: torch.save(vars(self), file))

    @classmethod
    def read(cls, path: Path, shapes: Mapping[str, torch.Size]) -> "MemoryFile":
        """Read a file. Raises ConfigError, in one line, if it cannot be read or is of other parameters."""
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises what unpickling brings
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"the memory in {path} cannot be read: {reason}") from None
        found = found if isinstance(found, dict) else {}
        try:
            check_format(found.get("format"), f"the memory in {path}")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if found.keys() != {field.name for field in fields(cls)}:
            raise ConfigError(f"the memory in {path} is damaged: it lacks or has other entries")
        memory = cls(**found)
        if {name: tensor.shape for name, tensor in memory.pending.items()} != dict(shapes):
            raise ConfigError(f"the memory in {path} is of other parameters")
        return memory


class OwnFile:
    """The memory file of a worker that lives, locked against a second worker until `close` or the end of the process.

    Raises ConfigError if another process has the lock, naming it, or if the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._attempt: int | None = None  # after which the file was written; None: unknown
        self._claimed = False
        self.close = weakref.finalize(self, _unlock, _locked(path), _lock_of(path), os.getpid())

    def holds(self, attempt: int) -> bool:
        """Return True if the file has the memory that its worker had after this attempt at a round."""
        return self._attempt == attempt and self.path.is_file()

    def claim(self, shapes: Mapping[str, torch.Size], roster: Roster) -> tuple[MemoryFile | None, float]:
        """Return the memory to continue with, None without one, and the norm of a lost one; enables `save`.

        The memory is that of the file, or zero if its worker has sent since it was written: then the later memory is
        lost. A file that is outdated, unreadable or of another run is set aside, with a warning. Raises ConfigError if
        its worker was in the last round, so that the file is a copy, or its lock did not work.
        """
        found = self._read(shapes, roster.run)
        self._claimed = True
        if found is None:
            return None, 0.0
        # The file of a worker of the last round is a copy.
        taken, member = roster.taken.get(found.worker, 0), roster.members.get(found.worker)
        if member is not None and member.here:
            self._claimed = False
            raise ConfigError(
                f"the memory in {self.path} is that of worker {found.worker:x}, which is training now; give each "
                "worker a file of its own"
            )
        # A memory may be used once: one older than its worker's last attempt has been sent.
        if taken == found.attempt:
            self._attempt = taken
            return found, 0.0
        self._set_aside(
            f"the memory in {self.path}, of norm {found.norm:.3g}, is older than what its worker has sent since"
        )
        if member is None:  # the others have forgotten its worker, and counted its memory
            return None, 0.0
        nothing = {name: torch.zeros_like(error) for name, error in found.pending.items()}
        return replace(found, attempt=taken, pending=nothing), member.norm

    def _read(self, shapes: Mapping[str, torch.Size], run: int) -> MemoryFile | None:
        """Return the file's memory if it is of this run; else set the file aside."""
        if not self.path.exists():
            return None
        try:
            found = MemoryFile.read(self.path, shapes)
        except ConfigError as error:
            self._set_aside(str(error))
            return None
        if found.run != run:
            self._set_aside(f"the memory in {self.path}, of norm {found.norm:.3g}, is of another run")
            return None
        return found

    def _set_aside(self, reason: str) -> None:
        """Rename the file to a name that is free, so that nothing overwrites it."""
        aside, more = self.path.with_name(f"{self.path.name}.unusable"), 1
        while aside.exists():
            more += 1
            aside = self.path.with_name(f"{self.path.name}.unusable-{more}")
        self.path.rename(aside)
        _log.warning("%s; it is set aside as %s", reason, aside)

    def save(self, memory: MemoryFile) -> bool:
        """Write a memory, once what was in the file is claimed; return False, with a warning, if that is impossible."""
        if not self._claimed:
            return False
        try:
            memory.write(self.path)
        except OSError as error:
            _log.warning("the memory cannot be written to %s: %s", self.path, error.strerror or error)
            return False
        self._attempt = memory.attempt
        return True

    def remove(self) -> None:
        """Remove the file, whose memory has been sent."""
        if self._claimed:
            with suppress(OSError):  # as outdated it is set aside later
                self.path.unlink(missing_ok=True)


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _locked(path: Path) -> int | None:
    """Lock a memory file; None, with a warning, without locks."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return acquire(_lock_of(path))
    except HeldError as holder:
        raise ConfigError(
            f"the memory in {path} is in use by {holder}; give each worker a file of its own, or end the other first"
        ) from None
    except NoLocksError as error:
        _log.warning("%s is on a file system without locks (%s): no other worker may use it", *(path, error.strerror))
        return None
    except OSError as error:
        raise ConfigError(f"the memory cannot be written to {path}: {error.strerror}") from None


def _unlock(number: int | None, path: Path, owner: int) -> None:
    if number is not None and os.getpid() == owner:  # and not a process that was forked since
        release_everywhere(number, path)
