"""Live progress of a run on the terminal: loss, gradient norm, bytes sent and time left."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Report(Protocol):
    """Called with the step reached and what was measured there."""

    def __call__(self, step: int, text: str) -> None: ...


@contextmanager
def live(label: str, total: int, *, quiet: bool) -> Iterator[Report]:
    """Show a bar on a terminal, a line at every tenth of the way elsewhere, and nothing if `quiet`."""
    console = Console()
    if quiet:
        yield lambda step, text: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console) as bar:
            task = bar.add_task(label, total=total, text="starting")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        tenths = 0

        def report(step: int, text: str) -> None:
            nonlocal tenths
            if step * 10 // total > tenths:
                tenths = step * 10 // total
                console.print(f"{label}: {tenths * 10:3d}%  {text}", highlight=False, soft_wrap=True)

        yield report


def megabytes(count: float) -> str:
    """Format a number of bytes in units of 10^6 bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
