"""The lock on a folder that is being trained in: one process and its workers, until the last of them is gone.

It is the operating system's (flock), which lets go when no process has the lock's file open any more, however they
ended. A launcher that is killed leaves workers that still have to save, so they have the file open as well. The file,
`.lock`, names the holder; it is removed at the end, and one that is left by a killed process locks nothing.
"""

import errno
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import reduction
from pathlib import Path
from typing import Any

from packsaddle.errors import ConfigError
from packsaddle.runs.run_folder import written

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


LOCK = ".lock"
_LONGEST = 4096  # bytes of the file


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
    path = folder / LOCK
    with written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        number = _taken(path)
    try:
        yield None if number is None else FolderLock(number)
    finally:
        if number is not None:
            os.close(number)
            _clear(path)


def check_free(folder: Path) -> None:
    """Raise ConfigError, naming the holder, if another process has a folder's lock now."""
    with suppress(OSError):  # it was never taken, or there are no locks here
        number = os.open(folder / LOCK, os.O_RDWR)
        try:
            if not _lock(number, shared=True):
                raise _held(folder / LOCK)
        finally:
            os.close(number)


def _taken(path: Path) -> int | None:
    """Open and lock a lock's file, which whoever let go of it may be removing meanwhile; None if there are no locks."""
    while True:
        number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(number):
                raise _held(path)
        except OSError as error:
            os.close(number)
            path.unlink(missing_ok=True)
            print(
                f"packsaddle: warning: {path.parent} is on a file system without locks ({error.strerror}), so nothing "
                f"keeps a second process from training in it",
                file=sys.stderr,
            )
            return None
        except ConfigError:
            os.close(number)
            raise
        if _is_at(number, path):
            _sign(number)
            return number
        os.close(number)


def _lock(number: int, *, shared: bool = False) -> bool:
    """Lock an open file, unless another process has; return whether it is locked. Raises OSError without locks."""
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(number, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_at(number: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(number), path.stat())
    except FileNotFoundError:
        return False


def _sign(number: int) -> None:
    """Say in the file who holds it; on a full disk it holds all the same."""
    with suppress(OSError):
        os.ftruncate(number, 0)
        os.pwrite(number, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _clear(path: Path) -> None:
    """Remove a lock's file unless it is held, by a worker that is left or by the next run."""
    with suppress(OSError):
        number = os.open(path, os.O_RDWR)
        try:
            if _lock(number) and _is_at(number, path):
                path.unlink()
        finally:
            os.close(number)


def _held(path: Path) -> ConfigError:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_LONGEST))
        whose = f"process {int(found['pid'])} on {str(found['host'])[:255]!r}, or workers that it has left"
    except (OSError, ValueError, KeyError, TypeError):
        whose = "another process"
    return ConfigError(f"{path.parent} is being trained in by {whose}; wait for its end, or end it first")
