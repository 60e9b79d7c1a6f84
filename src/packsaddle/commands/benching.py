"""packsaddle bench step | compress | exchange | train | link."""

import json as json_format
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from packsaddle.bench.result import Result, shown
from packsaddle.commands.console import print_table
from packsaddle.schema import ConfigError


@dataclass(frozen=True)
class Step:
    """What does an optimizer step cost, beside torch.optim.SGD's, and beside the memory it must move?"""

    d: int = 25_000_000
    """Coordinates."""
    layers: int = 1
    """Parameters that the coordinates are spread over."""
    repeats: int = 7
    """Timed rounds."""

    def run(self) -> list[Result]:
        from packsaddle.bench import step

        return step.run(self.d, self.repeats, self.layers)


@dataclass(frozen=True)
class Compress:
    """What do packing and unpacking cost, beside copying the vector once?"""

    d: int = 25_000_000
    """Coordinates."""
    ratio: float = 0.01
    """k/d of the compressors that have one."""
    repeats: int = 5
    """Timed rounds."""

    def run(self) -> list[Result]:
        from packsaddle.bench import compress

        return compress.run(self.d, self.ratio, self.repeats)


_Question = Annotated[Step, tyro.conf.subcommand("step")] | Annotated[Compress, tyro.conf.subcommand("compress")]


def bench(question: Annotated[_Question, tyro.conf.arg(name="")], json: bool = False) -> None:
    """Measure, side by side in one run: packsaddle, its peers, and the floor below which nobody can go.

    Args:
        question: What to measure.
        json: Print one JSON document.
    """
    try:
        results = question.run()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if json:
        print(json_format.dumps([result.plain() for result in results], indent=2))
    else:
        for result in results:
            show(result)


def show(result: Result) -> None:
    """Print one table with its setting and notes."""
    columns = list(result.rows[0])
    table = Table(*columns, title=result.question, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for row in result.rows:
        table.add_row(*(shown(row[name]) for name in columns))
    print_table(table)
    print("  ".join(f"{name}: {shown(value)}" for name, value in result.setting.items()))
    for note in result.notes:
        print(f"- {note}")
