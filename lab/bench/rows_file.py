"""CSV files of a race: appending rows, with one header, and reading them back with validation."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows with equal columns to a file. Columns that the file does not have are empty in its older rows."""
    new = list(rows)
    if not new:
        return
    columns, old = list(new[0]), list[dict[str, Any]]()
    if path.exists():
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            header, old = list(reader.fieldnames or ()), list(reader)
        columns = list(dict.fromkeys([*header, *columns]))
        if columns == header:
            _write(path, "a", columns, new, header=False)
            return
    partial = path.with_suffix(".partial")
    _write(partial, "w", columns, [*old, *new], header=True)
    partial.replace(path)


def _write(path: Path, mode: str, columns: list[str], rows: Iterable[Mapping[str, Any]], *, header: bool) -> None:
    with path.open(mode, newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if header:
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
