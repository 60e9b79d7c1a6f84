"""Live progress of a run on the terminal: loss, gradient norm, bytes sent and time left."""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from packsaddle.messages import printable

_BETWEEN_LINES = 10.0  # seconds


class Report(Protocol):
    """Called with the step reached and what was measured there."""

    def __call__(self, step: int, text: str) -> None: ...


@contextmanager
def live(label: str, total: int, *, quiet: bool, first: int = 0) -> Iterator[Report]:
    """Show a bar on a terminal, a line at every tenth of the way elsewhere, and nothing if `quiet`.

    `first` steps were done before.
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
        tenths, last, begin = first * 10 // total, "", time.monotonic()

        def report(step: int, text: str) -> None:
            nonlocal tenths, last
            if step * 10 // total > tenths:
                tenths = step * 10 // total
                left = (time.monotonic() - begin) / (step - first) * (total - step)
                said = [text] * (text != last) + [_left(left)] * (step < total)  # what was measured is said once
                console.print(
                    f"{label}: {tenths * 10:3d}%  {'  '.join(said)}", highlight=False, soft_wrap=True, markup=False
                )
                last = text

        yield report


@contextmanager
def countdown(label: str, total: int, *, quiet: bool) -> Iterator[Report]:
    """Show on stderr how much is left at most: a bar on a terminal, elsewhere lines at intervals, or nothing."""
    console = Console(stderr=True)
    if quiet:
        yield lambda step, text: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}, left at most"))
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task(escape(label), total=total, text="starting")
            yield lambda step, text: bar.update(task, completed=step, text=text)
    else:
        begin = printed = time.monotonic()

        def report(step: int, text: str) -> None:
            nonlocal printed
            now = time.monotonic()
            if now - printed >= _BETWEEN_LINES and step:
                printed = now
                left = (now - begin) / step * (total - step)
                console.print(f"{label}: {text}, {_left(left)}", highlight=False, soft_wrap=True, markup=False)

        yield report


def _left(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min left" if seconds >= 60 else f"about {seconds:.0f} s left"


class StudyProgress:
    """The progress of many runs: on a terminal a bar for all and one for each that is running, elsewhere a line
    from time to time; with the time left at the pace so far."""

    def __init__(self, label: str, runs: int) -> None:
        self._label, self._runs = printable(label), runs
        self._console = Console()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self._bars = Progress(*columns, console=self._console, disable=not self._console.is_terminal)
        self._shown: dict[str, TaskID] = {}
        self._begin = time.monotonic()
        self._first: float | None = None  # done when it began
        self._printed = -1

    def __enter__(self) -> "StudyProgress":
        self._bars.start()
        self._whole = self._bars.add_task(escape(self._label), total=self._runs, text="starting")
        return self

    def __exit__(self, *failure: object) -> None:
        self._bars.stop()

    def show(self, shares: Mapping[str, float], active: Collection[str]) -> None:
        """`shares` has the share of each run that is done, `active` the running ones."""
        done = sum(shares.values())
        self._first = done if self._first is None else self._first
        finished = sum(share == 1 for share in shares.values())
        text = f"{finished} of {self._runs} runs, {self._left(done)}"
        self._bars.update(self._whole, completed=done, text=text)
        for name in active:
            if name not in self._shown:
                self._shown[name] = self._bars.add_task(f"  {escape(printable(name))}", total=1.0, text="")
            self._bars.update(self._shown[name], completed=shares[name])
        for name in [name for name in self._shown if name not in active]:
            self._bars.remove_task(self._shown.pop(name))
        if not self._console.is_terminal and finished > self._printed:
            self._printed = finished
            self._console.print(f"{self._label}: {text}", highlight=False, soft_wrap=True, markup=False)

    def _left(self, done: float) -> str:
        since = done - (self._first or 0.0)
        if since <= 0:
            return "time left unknown"
        seconds = (time.monotonic() - self._begin) / since * (self._runs - done)
        return _left(seconds)


def megabytes(count: float) -> str:
    """Format a number of bytes in units of 10^6 bytes."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e3:,.1f} kB"
