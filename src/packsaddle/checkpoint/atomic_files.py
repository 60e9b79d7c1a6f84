"""Atomic file writes: a file is complete or absent, even after a killed process or a power failure."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL = ".partial"  # suffix of a file that is being written


def write_whole(target: Path, write: Callable[[BinaryIO], Any], digest: Any = None) -> int:
    """Write a file atomically: call `write(file)` on a temporary file, fsync it, and rename it to `target`. Returns the
    size of the file in bytes. If writing fails with an OSError, a file that existed at `target` is unchanged. `digest`,
    a hashlib object, is updated with the bytes of the file."""
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
    sync_folder(target.parent)
    return size


def sync_folder(folder: Path) -> None:
    """Make new and renamed files in a folder durable, i.e. present after a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path) -> Path:
    """Rename an unusable file or folder to PATH.unusable, and return the new path. If PATH.unusable exists already, the
    new path is the first of PATH.unusable-2, PATH.unusable-3, ... that does not exist."""
    aside, number = path.with_name(f"{path.name}.unusable"), 1
    while aside.exists():
        number += 1
        aside = path.with_name(f"{path.name}.unusable-{number}")
    return path.rename(aside)


class _Sink:
    """A file object to pass to `torch.save`. If writing fails with an OSError, the method `write` stores the error,
    and the method `check` raises it later, since `torch.save` may crash the process if `write` raises."""

    def __init__(self, file: BinaryIO, digest: Any) -> None:
        self._file, self._digest = file, digest
        self._failure: OSError | None = None

    def write(self, data: Any) -> int:
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
        """No-op: `check` flushes the file."""

    def check(self) -> None:
        if self._failure is not None:
            raise self._failure
        self._file.flush()
