"""Functions shared by the commands: printing of tables, and a test if this process may print (rank 0)."""

import os
import re

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from packsaddle.messages import printable

_WIDTH, _UNLIMITED = 80, 10_000


def number_table(*headings: str, words: int = 1) -> Table:
    """Return an empty table with the column headings `headings`. The first `words` columns are for text, and
    left-aligned. The remaining columns are for numbers, and right-aligned."""
    table = Table(*headings)
    for column in table.columns[words:]:
        column.justify = "right"
    return table


def digits(number: float) -> str:
    """Return a positive number as text. Numbers from 1000 on are rounded to whole numbers, with commas between
    thousands. Numbers below 1000 have four significant digits, and an exponent only below 1e-4."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.4g}"


def plain_text(text: str) -> Text:
    """Return `text` as the content of a cell of a rich table. Markup in `text` is not interpreted, and control
    characters in it are escaped."""
    return Text(printable(text))


def print_table(table: Table, uncut: str = "") -> None:
    """Print a table, shrunk to the width of the terminal if that is possible without breaking a word. In a pipe or a
    file the width of the table is at most 80 columns, unless its longest words need more.

    `uncut` is a hint, such as "--json prints it whole". It is printed below a table that needs more columns than the
    terminal has or, in a pipe or a file, more than 80.
    """
    console = Console()
    if table.box is None:
        console.print(table)
        return
    table.box, table.pad_edge, table.show_edge, table.padding = box.SIMPLE_HEAD, False, False, (0, 1, 0, 0)

    # A column's width is between the length of its longest word and the length of its longest cell.
    wide = console.options.update(width=_UNLIMITED)
    least, widths = [], []
    for column in table.columns:
        sizes = [Measurement.get(console, wide, cell) for cell in (column.header, *column.cells)]
        widths.append(max(size.maximum for size in sizes))
        least.append(widths[-1] if column.no_wrap else max(size.minimum for size in sizes))
    gaps = 2 * (len(widths) - 1)
    needed = sum(least) + gaps
    if not console.is_terminal:
        console = Console(width=max(_WIDTH, needed))

    # Shrink the widest column by one until the table fits, or until no column can shrink further.
    while sum(widths) + gaps > console.width and widths != least:
        widest = max((i for i in range(len(widths)) if widths[i] > least[i]), key=widths.__getitem__)
        widths[widest] -= 1
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    console.print(table)
    console.print()
    if uncut and needed > (console.width if console.is_terminal else _WIDTH):
        print(f"The table is {needed} columns wide; {uncut}.")


def brief(compressor: str) -> str:
    """Shorten a compressor's repr by removing the name of its first argument: "TopK(ratio=0.01)" becomes
    "TopK(0.01)"."""
    return re.sub(r"\((ratio|share|matrix_rank)=", "(", compressor)


def short_exchange(name: str) -> str:
    return name.removesuffix(" all-reduce")


def is_first() -> bool:
    """Return True if this process may print. Under a launcher such as torchrun, only rank 0 may print."""
    rank, size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    # If the launcher's variables are invalid, every process prints, so that the user sees the error.
    return not (rank.isdecimal() and size.isdecimal() and 0 < int(rank) < int(size))
