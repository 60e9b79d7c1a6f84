"""Values, labels and errors as text that a person reads: short, and nothing that a terminal would obey."""

from collections.abc import Sequence
from typing import Any

_SHOWN = 200  # characters of a value, or of a key, in a message
_LINE = 1000  # characters of a message


def shown(value: Any) -> str:
    """Return a value as a message shows it: its repr, cut in its middle where that is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # integers of more digits than Python writes; lists in lists in lists
        return f"a {type(value).__name__} that is too large to show"
    return shortened(text)


def shortened(text: str, most: int = _SHOWN) -> str:
    """Return a text, without its middle if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 2 :]}"


def printable(text: str) -> str:
    """Return a text whose control characters (a terminal obeys them), line ends included, are written as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def cell(value: Any) -> Any:
    """Return a value for a CSV file: a text that a spreadsheet would run as a formula has an apostrophe before it.

    So has one that begins with an apostrophe, so that `read_cell` can undo it.
    """
    starts = ("'", "=", "+", "-", "@", "\t", "\r", "\n")
    return f"'{value}" if isinstance(value, str) and value.startswith(starts) else value


def read_cell(text: str) -> str:
    """Return the text that `cell` wrote."""
    return text.removeprefix("'")


def one_line(text: str) -> str:
    """Return a message as one line that a terminal shows and does not obey."""
    return shortened(printable(" ".join(text.split())), _LINE)


def first_line(error: Exception) -> str:
    """Return an error's type and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def numbered(noun: str, numbers: Sequence[int]) -> str:
    """Return "worker 1", or "workers 1, 3"."""
    return f"{noun}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
