"""Numbers and durations as people write them: 1e6, 25_000_000, 25M, 1%; 55ms, 2min."""

import re

_SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*)?\.?[\d_]*(?:[eE][+-]?\d+)?)\s?([kKMGB%]?)")
_UNITS = {"us": 1e6, "ms": 1e3, "s": 1.0, "min": 1 / 60}  # in a second; by division 55ms is 0.055 exactly
_DURATION = re.compile(r"(.*?)\s?(us|ms|s|min)")
_EXACT = 2.0**53  # whole numbers above need not be what was written


def real(text: str) -> float:
    """Return a number, with a suffix k, M, G (or B) for thousands, millions, billions, or %. Raises ValueError."""
    match = _NUMBER.fullmatch(text.strip())
    if match is None or not match[2]:
        return float(text)  # which knows infinity too
    return float(match[1]) / 100 if match[2] == "%" else float(match[1]) * _SUFFIXES[match[2]]


def whole(text: str) -> int:
    """Return a whole number, written as `real` takes it. Raises ValueError for others."""
    try:
        return int(text)
    except ValueError:
        number = real(text)
    if not (number.is_integer() and abs(number) <= _EXACT):
        raise ValueError(repr(text))  # what a message says was got
    return int(number)


def seconds(text: str) -> float:
    """Return a duration in seconds: a number as `real` takes it, with a unit us, ms, s or min. Raises ValueError."""
    match = _DURATION.fullmatch(text.strip())
    return real(text) if match is None else real(match[1]) / _UNITS[match[2]]
