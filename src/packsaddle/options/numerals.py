"""Parsing of numbers and durations with units: 1e6, 25_000_000, 25M, 1%; 55ms, 2min."""

import re
from contextlib import suppress

_SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*)?\.?[\d_]*(?:[eE][+-]?\d+)?)\s?([kKMGB%]?)")
# Number of each unit in a second. Durations are divided by this number, so that 55ms is exactly the float 0.055.
_UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0, "min": 1 / 60}
_DURATION = re.compile(r"(.*?)\s?(us|ms|s|min)")
DURATION = "seconds such as 30, 55ms or 2min"
# Up to this magnitude every whole number is a float, so a parsed float is exactly the number that was written.
_EXACT = 2.0**53


def real(text: str) -> float:
    """Parse a number. It may end with k (1e3), M (1e6), G or B (1e9), by which it is multiplied, or with %, which
    divides it by 100. Raises ValueError if `text` is not such a number."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not match[2]:
        return float(text)  # `float` also parses inf
    return float(match[1]) / 100 if match[2] == "%" else float(match[1]) * _SUFFIXES[match[2]]


def whole(text: str) -> int:
    """Parse a whole number in the notation of `real`. Raises ValueError for a text that is not a whole number."""
    try:
        return int(text)
    except ValueError:
        number = real(text)
    if not (number.is_integer() and abs(number) <= _EXACT):
        raise ValueError(repr(text))  # callers quote the text in their messages
    return int(number)


def seconds(text: str) -> float:
    """Parse a duration, and return it in seconds. `text` is a number in the notation of `real`, followed by us, ms, s
    or min. Without a unit, the number is in seconds."""
    match = _DURATION.fullmatch(text.strip())
    return real(text) if match is None else real(match[1]) / _UNITS[match[2]]


def duration(value: float | str, name: str) -> float:
    """Return a duration in seconds. `value` is a number of seconds, or text such as "55ms". If `value` is neither,
    raises ValueError with a message that begins with `name`."""
    with suppress(ValueError):
        if isinstance(value, str):
            return seconds(value)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    raise ValueError(f"{name} must be {DURATION}, got {value!r}")
