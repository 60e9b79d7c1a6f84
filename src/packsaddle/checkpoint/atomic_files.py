"""Files that are there whole or not at all, also when a process is killed or the power goes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # what a file is called until it is whole


def write_whole(target: Path, write: Callable[[BinaryIO], Any], digest: Any = None) -> int:
    """Make a file by `write(file)`: aside, to the disk, and renamed; the folder is made. Raises OSError.

    What was there before stays if that fails, and nothing else is left behind. `file` has `write` and `flush`, as
    `torch.save` needs them. Returns the size in bytes; `digest`, of hashlib, is updated with what is written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    try:
        with partial.open("wb") as file:
            sink = _Sink(file, digest)
            write(sink)  # type: ignore[arg-type]
            sink.check()
            os.fsync(file.fileno())
            size = file.tell()
        partial.replace(target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)
    return size


def set_aside(path: Path) -> Path:
    """Rename a file or folder that cannot be used to PATH.unusable, or PATH.unusable-2, ...: the first free name.

    Returns the new path. Raises OSError.
    """
    aside, number = path.with_name(f"{path.name}.unusable"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.unusable-{number}")
    return path.rename(aside)


def _sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _Sink:
    """A file that raises the first OSError of its writes in `check`, since `torch.save` may not survive it."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
        """Write bytes, unless an earlier write has failed."""
        view = memoryview(data).cast("B")
        if self._failure is None:
            try:
                self._file.write(view)
            except OSError as failure:
                self._failure = failure
        if self._digest is not None:
            self._digest.update(view)
        return len(view)

    def flush(self) -> None:
        """No-op: `check` flushes."""

    def check(self) -> None:
        """Flush, and raise the OSError of a write that failed."""
        if self._failure is not None:
            raise self._failure
        self._file.flush()
