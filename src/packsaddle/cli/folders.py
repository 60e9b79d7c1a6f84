"""Creation of folders for results, and conversion of file system errors to one-line messages."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from packsaddle.errors import ConfigError


def make_new(path: Path) -> None:
    try:
        path.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"output folder {path} already exists; choose another with --out") from None
    except OSError as error:
        raise ConfigError(f"output folder {path} cannot be created: {error.strerror}") from None


@contextmanager
def written(folder: Path) -> Iterator[None]:
    """Context manager that converts an OSError, such as that of a full disk, to a ConfigError that names the folder."""
    try:
        yield
    except OSError as error:
        what = error.strerror or str(error)
        raise ConfigError(f"{folder} cannot be written: {what}; the files written so far remain readable") from None


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Context manager that creates a folder. If the block fails, the folder is removed, unless it contains files.
    Raises ConfigError if the folder exists or cannot be created."""
    make_new(folder)
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise
