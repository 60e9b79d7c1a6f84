"""What the commands share: tables, names of new folders, and who speaks to the user."""

import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from packsaddle.runfolder import Run


def print_runs(runs: Sequence[Run]) -> None:
    from packsaddle.report import HEADINGS, cells, row

    table = Table(*HEADINGS, caption="+ still on the plateau at the end of the run")
    for column in table.columns[1:]:
        column.justify = "right"
    for found in runs:
        table.add_row(*cells(row(found)))
    print_table(table)


def print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe or a file has no width to fit
    console.print(table)


def dated(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def is_first() -> bool:
    """Whether this process speaks to the user: under a launcher, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0"
