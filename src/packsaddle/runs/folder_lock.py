"""The lock on a folder that is being trained in: one process and its workers, until the last of them is gone.

A launcher that is killed leaves workers that still have to save, so they have the lock's file, `.lock`, open as well
(see `checkpoint.file_lock`).
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from packsaddle.checkpoint.file_lock import HeldError, NoLocksError, acquire, check_not_held, release
from packsaddle.errors import ConfigError
from packsaddle.runs.run_folder import written

LOCK = ".lock"


class FolderLock:
    """An open lock's file; what it is pickled into has it open too, where multiprocessing starts a process with it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        """Let go of it in this process."""
        os.close(self.number)

    def __reduce__(self) -> tuple[Callable[[Any], "FolderLock"], tuple[Any]]:
        return _inherited, (reduction.DupFd(self.number),)


def _inherited(sent: Any) -> FolderLock:
    return FolderLock(sent.detach())


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock | None]:
    """Hold the lock of a folder within, which is made if it is not there.

    Raises ConfigError, naming the holder, if another process has it, and if the folder cannot be written. None, with a
    warning on stderr, where the file system has no locks.
    """
    # Only a file system without locks lets the work begin without one.
    path = folder / LOCK
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            number = acquire(path)
        except HeldError as holder:
            raise _in_use(folder, holder) from None
        except NoLocksError as error:
            number = None
            print(
                f"packsaddle: warning: {folder} is on a file system without locks ({error.strerror}), so nothing "
                f"keeps a second process from training in it",
                file=sys.stderr,
            )
    try:
        yield None if number is None else FolderLock(number)
    finally:
        if number is not None:
            release(number, path)


def check_free(folder: Path) -> None:
    """Raise ConfigError, naming the holder, if another process has a folder's lock now."""
    try:
        check_not_held(folder / LOCK)
    except HeldError as holder:
        raise _in_use(folder, holder) from None


def _in_use(folder: Path, holder: HeldError) -> ConfigError:
    return ConfigError(f"{folder} is being trained in by {holder}; wait for its end, or end it first")
