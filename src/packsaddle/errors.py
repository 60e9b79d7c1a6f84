"""Exceptions with messages for users, checks of numbers, reading of text files, and import of optional packages.

Any module may import this one, since it imports no other module of packsaddle. The command line prints the message of
a ConfigError and exits with code 2. It prints the message of a GuardError and exits with code 1.
"""

import difflib
import functools
import importlib
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ConfigError(ValueError):
    """Raised for an invalid configuration or command; the message is one line."""


class GuardError(RuntimeError):
    """Raised on all workers if a check during training fails: too many consecutive steps were skipped, or the workers'
    parameters or settings differ. The message gives the reason."""


class MessageError(ValueError):
    """A compressor's message, i.e. a compressed vector that a worker sends, cannot be decoded.

    Attributes:
        part: name of the invalid part of the message.
        expected: text that describes the valid values of the part.
        found: the invalid value.
        compressor: name of the compressor.
        worker: rank of the sender; None: unknown.
    """

    def __init__(
        self, part: str, expected: str, found: object, compressor: str = "the compressor", worker: int | None = None
    ) -> None:
        super().__init__(part, expected, found, compressor, worker)
        self.part, self.expected, self.found, self.compressor, self.worker = part, expected, found, compressor, worker

    def __str__(self) -> str:
        sender = "" if self.worker is None else f" from worker {self.worker}"
        return f"{self.part} in a message of {self.compressor}{sender} must be {self.expected}, got {self.found}"


class MissingExtraError(ConfigError):
    """A feature needs an optional package that is not installed; the message has the command to install it."""


def check_integers(least: int, **values: object) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_counts(**values: int | None) -> None:
    """Raise ValueError, with the argument's name, for a value that is not a positive integer. None is accepted."""
    check_integers(1, **{name: value for name, value in values.items() if value is not None})


def check_positive(**values: float | None) -> None:
    """Raise ValueError, with the argument's name, for a value that is not positive and finite. None is accepted."""
    for name, value in values.items():
        if isinstance(value, str) or (value is not None and not 0 < value < math.inf):
            raise ValueError(f"{name} must be positive and finite, got {value!r}")


def check_not_negative(**values: float | None) -> None:
    """Raise ValueError, with the argument's name, for a value that is negative or not finite. None is accepted."""
    for name, value in values.items():
        if isinstance(value, str) or (value is not None and not 0 <= value < math.inf):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")


def check_momentum(momentum: object, nesterov: object) -> None:
    """Raise ValueError if the momentum is not in [0, 1), or if `nesterov` is true and the momentum is 0."""
    if isinstance(momentum, bool) or not (isinstance(momentum, Real) and 0 <= float(momentum) < 1):
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}")
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum above 0")


@contextmanager
def config_errors(prefix: str = "") -> Iterator[None]:
    """Context manager that converts a ValueError raised in its block to a ConfigError. The message of the ConfigError
    is `prefix` followed by the message of the ValueError. A ConfigError raised in the block is not changed.

    If `prefix` is "--", the first word of the ValueError's message must be the name of a parameter, which is converted
    to the name of a flag. For example "checkpoint_every must be" becomes "--checkpoint-every must be".
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
    """Return the text of a UTF-8 file. Raises ConfigError if the file cannot be read or is not UTF-8. The error message
    calls the file `name`."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} must be UTF-8, but byte {error.start} is not") from None
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}") from None


def suggests(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Return a decorator that makes a function raise TypeError for an unknown keyword argument. The error message
    suggests a valid argument.

    If the unknown name is a key of `names`, the suggestion is its value. `names` maps the argument names of other
    libraries to argument names of the function. For any other unknown name, the suggestion is the function's argument
    with the most similar spelling. If no argument is similar, the message lists all arguments of the function.
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        known = [p.name for p in inspect.signature(function).parameters.values() if p.name != "self"]

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            for given in kwargs.keys() - set(known):
                near = names.get(given) or next(iter(difflib.get_close_matches(given, known, 1)), None)
                hint = f", did you mean {near}=?" if near else f"; it has {', '.join(known)}"
                owner = function.__qualname__.removesuffix(".__init__")
                raise TypeError(f"{owner} has no argument {given}{hint}")
            return function(*args, **kwargs)

        return checked

    return decorate


def require(module: str, extra: str, purpose: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = {"sklearn": "scikit-learn"}.get(module.split(".")[0], module.split(".")[0])
        raise MissingExtraError(f"{purpose} needs {package}: pip install 'packsaddle[{extra}]'") from error
