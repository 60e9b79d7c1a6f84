"""Live progress on stderr: a progress bar or lines of text."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

_BETWEEN_LINES = 10.0  # seconds between two printed lines
Report = Callable[[int, str], None]  # called with the current step and a text to show, such as the loss


@contextmanager
def countdown(label: str, total: int) -> Iterator[Report]:
    """Context manager that shows progress on stderr, as a bar on a terminal and as lines of text in a file or a pipe.

    It yields a function to be called with the current step, at most `total`, and a text to show.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}")
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(escape(label), total=total, text="starting")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        # Print few lines, since the output may go to a log file.
        printed = time.monotonic()

        def report(step: int, text: str) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= _BETWEEN_LINES and step:
                printed = now
                console.print(f"{label}: {text}", highlight=False, soft_wrap=True, markup=False)

        yield report
