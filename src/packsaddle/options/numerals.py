"""Numbers as people write them: 1e6, 25_000_000, 25M, 1%."""

import re

_SUFFIXES = {"k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9}
_NUMBER = re.compile(r"([+-]?(?:\d[\d_]*)?\.?[\d_]*(?:[eE][+-]?\d+)?)\s?([kKMGB%]?)")
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
