"""Files that are there whole or not at all, also when a process is killed or the power goes."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # what a file is called until it is whole


def write_whole(target: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Make a file by `write(file)`: aside, to the disk, and renamed; the folder is made. Raises OSError.

    What was there before stays if that fails, and nothing else is left behind. `file` has `write` and `flush`, as
    `torch.save` needs them.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            sink = _Sink(file)
            write(sink)  # type: ignore[arg-type]
            sink.check()
            os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Sink:
    """A file that raises the first OSError of its writes in `check`, since `torch.save` may not survive it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, unless an earlier write has failed."""
        if self._failure is None:
            try:
                self._file.write(data)
            except OSError as failure:
                self._failure = failure
        return memoryview(data).nbytes

    def flush(self) -> None:
        """No-op: `check` flushes."""

    def check(self) -> None:
        """Flush, and raise the OSError of a write that failed."""
        if self._failure is not None:
            raise self._failure
        self._file.flush()


class Hashing:
    """A file that is written in order, its size and sha256; for `torch.save`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data).cast("B")
        self._file.write(view)
        self._hash.update(view)
        self.size += len(view)
        return len(view)

    def flush(self) -> None:
        """No-op: the file is flushed by its owner."""

    @property
    def sha256(self) -> str:
        """Of all that was written, in hexadecimal."""
        return self._hash.hexdigest()


def sha256_of(file: BinaryIO) -> str:
    """Return the sha256 of what a file has from where it is read, in hexadecimal."""
    digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
    return digest.hexdigest()
