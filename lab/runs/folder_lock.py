"""The lock on a run folder, held by one process and its workers until the last of them has exited."""

import fcntl
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from packsaddle.cli.folders import written
from packsaddle.errors import ConfigError


class FolderLock:
    """The file descriptor of a locked folder. It can be sent to a process started by multiprocessing.

    Unpickling it there duplicates the descriptor, so the lock is held until both processes have closed it. The
    operating system closes it if a process is killed.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def close(self) -> None:
        os.close(self.number)

    def __reduce__(self) -> tuple[Callable[[Any], "FolderLock"], tuple[Any]]:
        return _inherited, (reduction.DupFd(self.number),)


def _inherited(sent: Any) -> FolderLock:
    return FolderLock(sent.detach())


@contextmanager
def locked(folder: Path) -> Iterator[FolderLock | None]:
    """Context manager that holds the lock of a run folder; the folder is created if missing.

    Yields the lock, or None, with a warning on stderr, if the file system has no locks. Raises ConfigError if another
    process holds the lock, or if the folder cannot be written.
    """
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FolderLock(os.open(folder, os.O_RDONLY))
    try:
        failure = _acquire(lock, fcntl.LOCK_EX, folder)
        if failure is not None:
            print(
                f"packsaddle: warning: {folder} is on a file system without locks ({failure.strerror}), so a "
                f"second process could train in it at the same time",
                file=sys.stderr,
            )
        yield lock if failure is None else None
    finally:
        lock.close()


def check_free(folder: Path) -> None:
    """Raise ConfigError if a process holds the lock of the folder now."""
    if folder.is_dir():
        lock = FolderLock(os.open(folder, os.O_RDONLY))
        try:
            _acquire(lock, fcntl.LOCK_SH, folder)
        finally:
            lock.close()


def _acquire(lock: FolderLock, kind: int, folder: Path) -> OSError | None:
    """Lock an open folder without waiting. Returns the error if the file system has no locks, and None otherwise.
    Raises ConfigError if another process holds the lock."""
    try:
        fcntl.flock(lock.number, kind | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ConfigError(
            f"{folder} is being trained in by another process, or by workers that it has left; wait for its end, or "
            f"end it first"
        ) from None
    except OSError as error:
        return error
    return None
