"""Live progress on the terminal: a bar, or lines, with a text such as the loss, and with the time left."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from packsaddle.cli.progress import Report, time_left
from packsaddle.messages import printable


@contextmanager
def live(label: str, total: int, *, quiet: bool, first: int = 0) -> Iterator[Report]:
    """Context manager that shows the progress of `total` steps, of which `first` are already done.

    A terminal shows a bar; other outputs get a line every 10%. With `quiet` nothing is shown.
    """
    console, label = Console(), printable(label)
    if quiet:
        yield lambda step, text: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(escape(label), total=total, completed=first, text="starting")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        # The time left is extrapolated from the duration of the steps since `first`.
        tenths, last, begin = first * 10 // total, "", time.monotonic()

        def report(step: int, text: str) -> None:
            nonlocal tenths, last
            if step * 10 // total > tenths:
                tenths = step * 10 // total
                left = (time.monotonic() - begin) / (step - first) * (total - step)
                # Do not repeat an unchanged text.
                shown = "  ".join([text] * (text != last) + [time_left(left)] * (step < total))
                console.print(f"{label}: {tenths * 10:3d}%  {shown}", highlight=False, soft_wrap=True, markup=False)
                last = text

        yield report


def megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
