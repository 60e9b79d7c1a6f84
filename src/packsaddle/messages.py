"""Formatting of values, labels and errors for messages, as short texts without terminal control characters."""

from collections.abc import Sequence
from typing import Any

_SHOWN = 200  # maximum number of characters of a value, or of a key, in a message
_LINE = 1000  # maximum number of characters of a message


def shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # repr rejects integers with too many digits, and deeply nested lists
        return f"a {type(value).__name__} that is too large to show"
    return shortened(text)


def shortened(text: str, most: int = _SHOWN) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str) -> str:
    return shortened(printable(" ".join(text.split())), _LINE)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return a noun with one or several numbers, such as "worker 1" or "workers 1, 3"."""
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
