"""Functions for the lab's commands: print a table of runs, name new folders, and require the packages of figures."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from lab.runs.report.tables import run_table
from lab.runs.run_folder import Run
from packsaddle.cli.console import number_table, plain_text, print_table
from packsaddle.errors import require


def print_runs(runs: Sequence[Run]) -> None:
    found = run_table(runs)
    still = any(cell.endswith("+") for cells in found.rows for cell in cells[1:])
    caption = "MB per worker: without rank 0's parameters at the start"
    caption += "; + still on the plateau at the end of the run" if still else ""
    table = number_table(*found.headings)
    table.caption, table.caption_justify = caption, "left"
    for cells in found.rows:
        table.add_row(*map(plain_text, cells))
    print_table(table)


def require_plots(purpose: str) -> None:
    """Raise MissingExtraError if matplotlib or jinja2 is missing. Call before the runs start, so that none is lost."""
    for module in ("matplotlib", "jinja2"):
        require(module, "lab", purpose)


def dated(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
