"""CSV files of a race's results: adding rows to a file with one header, and reading rows with validation."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def add_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows, which all have the same columns, to a CSV file.

    Columns that are new to the file are added to it, and are empty in its older rows.
    """
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
    """Return the rows of a CSV file, converted by `read`; [] if the file does not exist.

    Raises ValueError for an invalid row. Its message uses `what`, the name of a row, such as "curve".
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        try:
            return [read(row) for row in csv.DictReader(file)]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} has a row that is no {what}: {error}") from None
