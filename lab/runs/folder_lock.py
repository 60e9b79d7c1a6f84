"""The lock on a run folder, held by one process and its workers until the last of them has exited."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from packsaddle.checkpoint.file_lock import HeldError, NoLocksError, acquire, check_not_held, release
from packsaddle.cli.folders import written
from packsaddle.errors import ConfigError

LOCK = ".lock"


class FolderLock:
    """The file descriptor of a held lock. It can be sent to a process started by multiprocessing.

    Unpickling it there duplicates the descriptor, so the lock is held until both processes have closed it.
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
    process holds the lock, which is then named, or if the folder cannot be written.
    """
    # Training starts without a lock only if the file system does not support locks.
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
                f"packsaddle: warning: {folder} is on a file system without locks ({error.strerror}), so a "
                f"second process could train in it at the same time",
                file=sys.stderr,
            )
    try:
        yield None if number is None else FolderLock(number)
    finally:
        if number is not None:
            release(number, path)


def check_free(folder: Path) -> None:
    try:
        check_not_held(folder / LOCK)
    except HeldError as holder:
        raise _in_use(folder, holder) from None


def _in_use(folder: Path, holder: HeldError) -> ConfigError:
    return ConfigError(f"{folder} is being trained in by {holder}; wait for its end, or end it first")
