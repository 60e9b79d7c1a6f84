"""Live progress on stderr: a progress bar or lines of text, with an upper bound on the time left if steps are equal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_BETWEEN_LINES = 10.0  # seconds between two printed lines
Report = Callable[[int, str], None]  # called with the current step and a text to show, such as the loss


@contextmanager
def countdown(label: str, total: int, *, quiet: bool, equal: bool = True) -> Iterator[Report]:
    """Context manager that shows progress on stderr, as a bar on a terminal and as lines of text in a file or a pipe.

    It yields a function to be called with the current step, at most `total`, and a text to show. If all steps take
    about equally long (`equal`), the time left is shown as well. It is extrapolated to step `total`, so it is an upper
    bound if the work may end earlier. With `quiet` nothing is shown.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda step, text: None
    elif console.is_terminal:
        text = "{task.fields[text]}" + ", left at most" * equal
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn(text), *[TimeRemainingColumn()] * equal)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(escape(label), total=total, text="starting")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        # Print few lines, since the output may go to a log file.
        begin = printed = time.monotonic()

        def report(step: int, text: str) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= _BETWEEN_LINES and step:
                printed = now
                left = f", {time_left((now - begin) / step * (total - step))}" * equal
                console.print(f"{label}: {text}{left}", highlight=False, soft_wrap=True, markup=False)

        yield report


def time_left(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 60 else f"about {seconds:.0f} s left"
