"""The file that stores a worker's error memory while the worker is absent.

An error memory may be loaded only once: updates that were sent after the file was written must not be sent again. So
the file contains the ids of its worker and of the run, and the number of the worker's last attempt at a round that was
committed with its update. `OwnFile.claim` compares them with the records that all workers share (`Roster`). In a round
the file is written before other workers may commit the round. It then contains two error memories, one for each
outcome, so that a worker that is killed before it knows the outcome loses no update. The file is written atomically,
and read with weights_only=True.
"""

import logging
import math
import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packsaddle.checkpoint.atomic_files import set_aside, write_whole
from packsaddle.checkpoint.file_lock import HeldError, NoLocksError, acquire, release_everywhere
from packsaddle.errors import ConfigError
from packsaddle.feedback.state import FORMAT, check_format
from packsaddle.local.elastic.roster import Roster

_log = logging.getLogger("packsaddle")


@dataclass(frozen=True)
class MemoryFile:
    """The contents of a worker's memory file: its unsent updates by parameter, and the attempt at a round after which
    they were unsent."""

    run: int  # id of the run, a hash of the names of the workers in its first round
    worker: int  # id of the worker
    attempt: int  # number of the worker's last attempt at a round that was committed with its update
    # Unsent updates by parameter name, floating-point tensors with the shapes of the parameters.
    error: Mapping[str, Tensor]
    next_attempt: int = 0  # number of the worker's attempt at the round in progress; 0: no round in progress
    # The updates that are still unsent if the round in progress is committed, by parameter name. Empty: no round in
    # progress.
    next_error: Mapping[str, Tensor] = field(default_factory=dict)
    format: int = FORMAT

    @property
    def norm(self) -> float:
        return math.sqrt(sum(float(error.double().square().sum()) for error in self.error.values()))

    def write(self, path: Path) -> None:
        write_whole(path, lambda file: torch.save(vars(self), file))

    @classmethod
    def read(cls, path: Path, shapes: Mapping[str, torch.Size]) -> "MemoryFile":
        """Read an error memory from a file. Raises ConfigError, with a message of one line, if the file is unreadable,
        or if its tensors do not have the `shapes`, given by parameter name."""
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling may raise any type
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
        for found in (memory.error, memory.next_error) if memory.next_attempt else (memory.error,):
            if {name: tensor.shape for name, tensor in found.items()} != dict(shapes):
                raise ConfigError(f"the memory in {path} is of other parameters")
        return memory


class OwnFile:
    """The file for this worker's error memory. It is locked against other processes until `close` is called or the
    process ends.

    Raises ConfigError if another process has the lock (the message names that process), or if the folder cannot be
    written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Numbers of the worker's attempts at rounds: the file has the error memory after the first, and after the
        # second if that is committed.
        self._attempts: tuple[int, ...] = ()
        self._claimed = False
        lock, number = path.with_name(f"{path.name}.lock"), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number = acquire(lock)
        except HeldError as holder:
            raise ConfigError(
                f"the memory in {path} is in use by {holder}; give each worker a file of its own, or end the other "
                f"first"
            ) from None
        except NoLocksError as error:
            why = error.strerror
            _log.warning("%s is on a file system without locks (%s): no other worker may use it", path, why)
        except OSError as error:
            raise ConfigError(f"the memory cannot be written to {path}: {error.strerror}") from None
        self.close = weakref.finalize(self, _unlock, number, lock, os.getpid())

    def holds(self, attempt: int) -> bool:
        """Return True if the file contains the worker's error memory as it was after the worker's attempt with the
        number `attempt` at a round."""
        return attempt in self._attempts and self.path.is_file()

    def claim(
        self, shapes: Mapping[str, torch.Size], roster: Roster, worker: int = 0, included: int = 0
    ) -> tuple[MemoryFile | None, float]:
        """Load the file, and return two results: the contents with which this worker continues, or None if there is no
        file of this run, and the norm of a lost error memory, or 0. From then on `save` writes to the file.

        If the file's worker has sent updates since the file was written, the returned error memory is zero, and the
        error memory that the worker had later is lost. If that worker is no longer in `roster`, the first result is
        None. An outdated or unreadable file, or a file of another run, is renamed, with a warning. `shapes` has the
        shapes of the parameters by name.

        `worker` and `included` are this worker's name and the number of its last attempt at a round that was committed
        with its update. If the file is of this worker, a checkpoint has restored the worker. If its error memory is
        current according to `roster`, the first result is None. Raises ConfigError if the file's worker is another
        worker that was in the last round: the file is then a copy, or locks do not work.
        """
        found = self._read(shapes, roster.run)
        self._claimed = True
        if found is None:
            return None, 0.0
        # If another worker wrote the file and was in the last round, it is still training, so this file must be a copy.
        taken, member = roster.taken.get(found.worker, 0), roster.members.get(found.worker)
        if found.worker == worker:
            if taken == included:
                return None, 0.0
        elif member is not None and member.here:
            self._claimed = False
            raise ConfigError(
                f"the memory in {self.path} is that of worker {found.worker:x}, which is training now; give each "
                "worker a file of its own"
            )
        # Select the memory for the outcome of the round that was in progress. If the records have a later attempt of
        # the file's worker, its memory was sent since, and must not be used again.
        if found.next_attempt and taken == found.next_attempt:
            found = replace(found, attempt=taken, error=found.next_error)
        if taken == found.attempt:
            self._attempts = (taken,)
            return found, 0.0
        self._set_aside(
            f"the memory in {self.path}, of norm {found.norm:.3g}, is older than what its worker has sent since"
        )
        if member is None:  # removed from the roster, which counted the worker's memory as lost then
            return None, 0.0
        nothing = {name: torch.zeros_like(error) for name, error in found.error.items()}
        return replace(found, attempt=taken, error=nothing), member.norm

    def _read(self, shapes: Mapping[str, torch.Size], run: int) -> MemoryFile | None:
        """Return the contents of the file if it was written in the run with the id `run`. Otherwise rename the file, if
        there is one, log a warning, and return None."""
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
        _log.warning("%s; it is set aside as %s", reason, set_aside(self.path))

    def save(self, memory: MemoryFile) -> bool:
        """Write `memory` to the file. Returns True if it was written. Returns False if `claim` was not called before,
        or if writing failed, which is logged."""
        if not self._claimed:
            return False
        try:
            memory.write(self.path)
        except OSError as error:
            _log.warning("the memory cannot be written to %s: %s", self.path, error.strerror or error)
            return False
        self._attempts = memory.attempt, memory.next_attempt or memory.attempt
        return True

    def remove(self) -> None:
        """Delete the file. Call after the error memory in the file has been sent to the other workers. No-op if `claim`
        was not called."""
        if self._claimed:
            with suppress(OSError):  # if the file cannot be deleted, a later `claim` detects that it is outdated
                self.path.unlink(missing_ok=True)


def _unlock(number: int | None, path: Path, owner: int) -> None:
    if number is not None and os.getpid() == owner:  # a forked process must not release the lock
        release_everywhere(number, path)
