"""CSV files of a race, which grow by rows: a header once, and rows that are read back or refused by name."""

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
    """Return the rows of a file, none where there is no file. Raises ValueError that says `what` a row is not."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        try:
            return [read(row) for row in csv.DictReader(file)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has a row that is no {what}: {error}") from None
