"""Parsing of --compressor and --ratio in `packsaddle plan`: a name such as topk, or a call such as TopK(0.01)."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TypeVar

from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import CLASSES, parse_compressor
from packsaddle.errors import ConfigError, config_errors
from packsaddle.options.schema import nearest

F = TypeVar("F", bound=Callable[..., None])

_KINDS = {name.lower(): kind for name, kind in CLASSES.items()}
WITH_RATIO: Mapping[str, Callable[[float], Compressor]] = {
    name: kind for name, kind in _KINDS.items() if any(field.metadata.get("share") for field in fields(kind))
}
FIXED: Mapping[str, Compressor] = {name: kind() for name, kind in _KINDS.items() if name not in WITH_RATIO}


def names_compressors(command: F) -> F:
    """Replace COMPRESSORS in a command's docstring, which is its help, by the class names that --compressor accepts."""
    command.__doc__ = (command.__doc__ or "").replace("COMPRESSORS", ", ".join(CLASSES))
    return command


def read_compressor(text: str, ratio: float | None) -> Compressor | str:
    """Return the compressor if `text` is a constructor call, such as "TopK(0.01)". If `text` is a name, return the name
    in lower case. Valid names are "best", the names of compressors with a ratio (WITH_RATIO), and the names of
    compressors without a ratio (FIXED). Raises ConfigError for any other text, and for a constructor call if a `ratio`
    is given too."""
    if "(" in text:
        if ratio is not None:
            raise ConfigError(f"ratio is for a compressor by name, got compressor {text!r}")
        with config_errors():
            return parse_compressor(text)
    name, names = text.lower(), ["best", *WITH_RATIO, *FIXED]
    if name not in names:
        raise ConfigError(f"compressor must be one of {', '.join(names)}, got {name!r}{nearest(name, names)}")
    return name
