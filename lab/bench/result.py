"""The results of a benchmark: a question, the setting, and rows of named figures, printed as a table or as JSON."""

import json as json_format
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table

from lab.origin import cpu_model
from packsaddle.cli import print_table
from packsaddle.errors import ConfigError


@dataclass(frozen=True)
class Result:
    """One table. Cells are strings, integers, floats or None (shown empty)."""

    question: str
    setting: Mapping[str, Any]  # sizes, rates, seeds, and the dictionary of `machine`
    rows: Sequence[Mapping[str, Any]]  # rows by column name, all with the same columns; names contain the units
    notes: Sequence[str] = ()  # notes needed to read the table, such as what a lower bound assumes
    digits: int = 3  # significant digits of a printed float

    def plain(self) -> dict[str, Any]:
        """Return the result as plain types; non-finite cells, such as times that no run reached, become None."""
        return asdict(self) | {"rows": [{name: _finite(cell) for name, cell in row.items()} for row in self.rows]}


def _finite(cell: Any) -> Any:
    return None if isinstance(cell, float) and not math.isfinite(cell) else cell


def machine(device: torch.device | str = "cpu", *, threads: int | None = None) -> dict[str, Any]:
    """Return the hardware and versions that affect results.

    `threads` is the number of torch's threads in the workers that measure; None: this process measures.
    """
    threads = torch.get_num_threads() if threads is None else threads
    where: dict[str, Any] = {"cpu": cpu_model(), "threads": threads, "torch": torch.__version__}
    if torch.device(device).type == "cuda":
        where["gpu"] = torch.cuda.get_device_name(device)
    return where


def shown(cell: Any, digits: int = 3) -> str:
    """Return the text of a table's cell, with `digits` significant digits if it is a float."""
    if cell is None:
        return ""
    if isinstance(cell, float) and abs(cell) < 1000:
        return f"{cell:.{digits}g}"
    return f"{cell:,.0f}" if isinstance(cell, int | float) else str(cell)


@dataclass(frozen=True)
class Question(ABC):
    """Base class of commands that measure, and print the results as tables."""

    # Print one JSON document
    json: bool = False

    @abstractmethod
    def run(self) -> list[Result]:
        """Measure and return the tables. Raises ValueError for a setting that cannot be measured."""

    def __call__(self) -> None:
        try:
            results = self.run()
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.json:
            print(json_format.dumps([result.plain() for result in results], indent=2, allow_nan=False))
        else:
            for result in results:
                show(result)


def show(result: Result) -> None:
    """Print one table with its setting and notes."""
    columns = list(result.rows[0])
    table = Table(*columns, title=result.question, title_justify="left")
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result.rows:
        table.add_row(*(shown(row[name], result.digits) for name in columns))
    print_table(table)
    print("  ".join(f"{name}: {shown(value)}" for name, value in result.setting.items()))
    for note in result.notes:
        print(f"- {note}")
