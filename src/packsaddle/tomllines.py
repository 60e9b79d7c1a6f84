"""Where in a TOML file its keys are: tomllib reads values, but keeps no positions."""

import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Key = tuple[str, ...]
_LONGEST = 300  # lines of a statement; each is read again with every line more


def line_of(key: Key, path: Path, text: str) -> str:
    """Return "FILE, line N" of a key, else of the innermost table around it that has a line, else "FILE"."""
    lines = key_lines(text)
    while key and key not in lines:
        key = key[:-1]
    return f"{path}, line {lines[key]}" if key else str(path)


def syntax_error(path: Path, error: ValueError) -> str:
    """Return the one line to say of a file that is not TOML, position first."""
    if not isinstance(error, tomllib.TOMLDecodeError):  # Python's, of integers with thousands of digits
        return f"{path}: an integer has too many digits; the largest is {2**63 - 1}"
    found = re.fullmatch(r"(.*) \(at (?:(line \d+, column \d+)|end of document)\)", str(error), re.DOTALL)
    reason, position = found.groups() if found else (str(error), None)
    return f"{path}, {position or 'at its end'}: not valid TOML: {' '.join(reason.split())}"


def key_lines(text: str) -> dict[Key, int]:
    """Return the line, from 1, where each key and each table of a TOML text is given.

    Lines are added until tomllib takes them: then they are one statement, since no part of one is valid by itself.
    A table's line is its header's, or where it is first named without one. The tables of an array ([[x]]) share their
    keys: of more than one, the keys inside are left out. So is all from a statement of hundreds of lines on.
    """
    lines: dict[Key, int] = {}
    table: Key = ()
    arrays: Counter[Key] = Counter()
    start, statement = 1, ""
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: TOML's lines end in nothing else
        statement += line + "\n"
        try:
            given = list(_keys(tomllib.loads(statement)))
        except (ValueError, RecursionError):
            if number - start < _LONGEST:
                continue
            break
        brackets = re.match(r"\s*(\[*)", statement)
        depth = len(brackets[1]) if brackets else 0  # 1: the header of a table, 2: of a table of an array
        for key in given:
            lines.setdefault(key if depth else (*table, *key), start)
        if depth:
            table = given[-1]
            arrays[table] += depth - 1
            lines[table] = start if depth == 1 else lines[table]
        start, statement = number + 1, ""
    repeated = [key for key, count in arrays.items() if count > 1]
    return {key: n for key, n in lines.items() if not any(key[: len(a)] == a != key for a in repeated)}


def _keys(table: dict[str, Any]) -> Iterator[Key]:
    """The paths of all keys, outer before inner; none of tables in lists. Without recursion, for any depth."""
    waiting: list[tuple[Key, dict[str, Any]]] = [((), table)]
    while waiting:
        path, table = waiting.pop()
        for name, value in table.items():
            yield (*path, name)
            if isinstance(value, dict):
                waiting.append(((*path, name), value))
