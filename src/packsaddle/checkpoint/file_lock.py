"""An advisory lock between processes, on a file (flock).

The operating system releases the lock when no process has the file open, even if its holder was killed. The file
contains the holder's process id and host; `release` removes the file.
"""

import errno
import json
import os
import socket
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no fcntl
    fcntl = None  # type: ignore[assignment]

_LONGEST = 4096  # maximum number of bytes to read from a lock file


class HeldError(RuntimeError):
    """Another process has the lock; the message names that process."""


class NoLocksError(OSError):
    """The file system does not support locks."""


def acquire(path: Path) -> int:
    """Create the file `path` and lock it. Returns the file's descriptor, which must stay open while the lock is needed.

    Raises HeldError if another process has the lock, NoLocksError if the file system does not support locks, and
    OSError if the file cannot be created or opened.
    """
    # The last holder may remove the file after it was opened here and before it is locked. The lock is then on a
    # deleted file, so try again.
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locked = _lock(fd)
        except OSError as error:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise NoLocksError(error.errno, error.strerror) from None
        if locked and _is_same_file(fd, path):
            with suppress(OSError):  # the lock is valid without the holder's process id and host
                os.ftruncate(fd, 0)
                os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
            return fd
        os.close(fd)
        if not locked:
            raise _held_error(path)


def release(fd: int, path: Path) -> None:
    """Close the descriptor `fd` of a lock, and remove the lock's file `path`. The file is not removed if another
    process has locked it meanwhile."""
    os.close(fd)
    with suppress(OSError):
        fd = os.open(path, os.O_RDWR)
        try:
            if _lock(fd) and _is_same_file(fd, path):
                path.unlink()
        finally:
            os.close(fd)


def release_everywhere(fd: int, path: Path) -> None:
    """Release the lock on the file `path` with the descriptor `fd`, even if forked child processes have inherited the
    descriptor."""
    assert fcntl is not None
    fcntl.flock(fd, fcntl.LOCK_UN)
    release(fd, path)


def check_not_held(path: Path) -> None:
    """Raise HeldError if a process holds the lock on the file `path` now."""
    with suppress(OSError):  # an OSError means that the file does not exist, or that locks are not supported
        fd = os.open(path, os.O_RDWR)
        try:
            if not _lock(fd, shared=True):
                raise _held_error(path)
        finally:
            os.close(fd)


def _lock(fd: int, *, shared: bool = False) -> bool:
    """Lock the open file with descriptor `fd`, without waiting. Returns False if another process holds a lock that
    excludes this one, and True otherwise.

    With `shared`, the lock excludes only exclusive locks, so several processes can hold it. Without `shared`, the lock
    is exclusive. Raises OSError if locks are unsupported.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_same_file(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _held_error(path: Path) -> HeldError:
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(_LONGEST))
        holder = f"process {int(found['pid'])} on {str(found['host'])[:255]!r}, or workers that it has left"
    except (OSError, ValueError, KeyError, TypeError):
        holder = "another process"
    return HeldError(holder)
