"""Live progress of a study: one bar for all of its runs, and one for each run in progress."""

import time
from collections.abc import Collection, Mapping

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn

from packsaddle.cli.progress import time_left
from packsaddle.messages import printable


class StudyProgress:
    """The progress of many runs, with the time left, extrapolated from the pace so far.

    A terminal shows one bar for all runs and one for each run in progress. Other outputs get a line for each finished
    run.
    """

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
        self._first: float | None = None  # number of runs that were done at the first call of `show`
        self._printed = -1

    def __enter__(self) -> "StudyProgress":
        self._bars.start()
        self._whole = self._bars.add_task(escape(self._label), total=self._runs, text="starting")
        return self

    def __exit__(self, *failure: object) -> None:
        self._bars.stop()

    def show(self, shares: Mapping[str, float], active: Collection[str]) -> None:
        """Update the bars. `shares` maps each run's name to the fraction that is done; `active` has the names of the
        runs in progress."""
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
        return time_left(seconds)
