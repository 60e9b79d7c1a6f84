"""Helpers of all commands: tables, names of new folders, and the process that prints."""

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packsaddle.errors import require
from packsaddle.experiments.run_folder import Run
from packsaddle.messages import printable


def print_runs(runs: Sequence[Run]) -> None:
    from packsaddle.experiments.report.tables import run_table

    found = run_table(runs)
    still = any(cell.endswith("+") for cells in found.rows for cell in cells[1:])
    table = Table(*found.headings, caption="+ still on the plateau at the end of the run" if still else None)
    for column in table.columns[1:]:
        column.justify = "right"
    for cells in found.rows:
        table.add_row(*map(plain_text, cells))
    print_table(table)


def print_settings(summary: Mapping[str, Any]) -> None:
    """A study's settings (see `experiments.reproduce.results`), means over seeds with 95% intervals."""
    quantities = {
        "final_loss": ("final loss", ".4f"),
        "test_accuracy": ("test accuracy", ".3f"),
        "plateau_epochs": ("epochs on plateau", ".1f"),
        "megabytes": ("MB", ",.1f"),
        "compression": ("compression", ",.1f"),
        "seconds": ("seconds", ",.0f"),
    }
    shown = {key: h for key, h in quantities.items() if any(entry[key] for entry in summary["settings"])}
    table = Table("setting", "seeds", *(heading for heading, _ in shown.values()))
    for column in table.columns[1:]:
        column.justify = "right"
    for entry in summary["settings"]:
        values = [_with_spread(entry[key], spec) for key, (_, spec) in shown.items()]
        table.add_row(plain_text(entry["setting"]), str(len(entry["seeds"])), *values)
    table.caption = "mean over seeds ± half of its 95% confidence interval"
    print_table(table)


def plain_text(text: str) -> Text:
    """A text for a rich table as it is: brackets mean nothing, and control characters are shown, not obeyed."""
    return Text(printable(text))


def _with_spread(found: Mapping[str, Any] | None, spec: str) -> str:
    if found is None:
        return "-"
    spread = None if found["high"] is None else found["high"] - found["mean"]
    return format(found["mean"], spec) + (f" ± {spread:{spec}}" if spread else "")


def print_table(table: Table) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a pipe or a file has no width to fit
    console.print(table)


def require_plots(purpose: str) -> None:
    """Raise MissingExtraError if what draws figures and pages is not installed: before the work, not after it."""
    for module in ("matplotlib", "jinja2", "plotly"):
        require(module, "plot", purpose)


def dated(name: str) -> Path:
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"


def is_first() -> bool:
    """Tell if this process prints: under a launcher, only rank 0 does."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))  # nonsense must be shown
