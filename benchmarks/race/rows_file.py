"""CSV files of a race: appending rows, with one header, and reading them back with validation."""

import csv
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def add_rows(path: Path, kind: type, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file whose columns are the fields of a dataclass."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path, read: Callable[[Mapping[str, Any]], Row], what: str) -> list[Row]:
    """Return the rows of a file, [] if it does not exist. Raises ValueError for a row that is not a `what`."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        try:
            return [read(row) for row in csv.DictReader(file)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has a row that is no {what}: {error}") from None
