"""Errors that users meet as one line, checks of numbers, the text of a file, and the import of optional packages.

Every layer may raise them, so they are apart from all algorithms. The command line prints a ConfigError and exits with
code 2, and a GuardError with code 1.
"""

import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


class ConfigError(ValueError):
    """A configuration (or command) that cannot be used; the message is one line.

    `key` is the path of the key that it is about, of the table if it is about several, () if there is none.
    """

    def __init__(self, message: str, key: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.key = key


class GuardError(RuntimeError):
    """A run cannot go on as it is, on any of its workers; the message says why."""


class MessageError(ValueError):
    """A compressor's message that cannot be decoded: a part has a wrong dtype, length or value, or is incomplete.

    `part` is the part's name, `expected` and `found` say what it must be and what it is, `compressor` whose it is.
    """

    def __init__(self, part: str, expected: str, found: object, compressor: str = "the compressor") -> None:
        super().__init__(part, expected, found, compressor)
        self.part, self.expected, self.found, self.compressor = part, expected, found, compressor

    def __str__(self) -> str:
        return f"{self.part} in a message of {self.compressor} must be {self.expected}, got {self.found}"


class MissingExtraError(ConfigError):
    """A feature needs a package that is not installed."""


def is_below(value: float, least: int) -> bool:
    """Return whether a value is not an integer of at least `least`; True and False are not."""
    return isinstance(value, bool) or value < least


def check_positive(**values: float | None) -> None:
    """Raise ValueError, with the name, for a value that is not positive and finite; None is not given, and passes."""
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def check_not_negative(**values: float | None) -> None:
    """Raise ValueError, with the name, for a value that is negative or not finite; None is not given, and passes."""
    for name, value in values.items():
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value}")


@contextmanager
def config_errors(prefix: str = "") -> Iterator[None]:
    """Raise a ValueError of the body as a ConfigError, its message after `prefix`.

    With "--" the message must begin with a parameter, which is written as its flag: --checkpoint-every.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        name, blank, problem = str(error).partition(" ")
        name = name.replace("_", "-") if prefix == "--" else name
        raise ConfigError(f"{prefix}{name}{blank}{problem}") from error


def read_text(path: Path, name: str) -> str:
    """Return the text of a UTF-8 file, or raise ConfigError that calls the file `name`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} must be UTF-8, but byte {error.start} is not") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise MissingExtraError that names the extra which brings it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'packsaddle[{extra}]'") from error
