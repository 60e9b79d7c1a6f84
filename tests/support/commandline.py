"""Functions that run command lines of the package and of the lab in this process."""

import re
import sys
from importlib import import_module
from typing import Any

import pytest

from packsaddle import cli

# The programs of the lab: for each name, the module that `python -m` would run.
LAB = {
    "lab.bench.pieces": "lab.bench.pieces",
    "lab.race": "lab.race.__main__",
    **{f"lab.paper.{name}": f"lab.paper.{name}" for name in ("figure1", "figure2", "language", "table1")},
    "lab": "lab.__main__",
}


def command(*arguments: Any) -> int:
    """Run `packsaddle`, or a program of `LAB` if one is named first, and return its exit code."""
    main = cli.main
    if arguments and arguments[0] in LAB:
        main, arguments = import_module(LAB[arguments[0]]).main, arguments[1:]
    before, sys.argv = sys.argv, ["packsaddle", *map(str, arguments)]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: Any) -> str:
    """Assert that a command with these arguments exits with code 2 and prints one line with `message` on stderr.

    Returns what it printed on stdout.
    """
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert re.match(r"(packsaddle|python -m [\w.]+): error: ", captured.err)
    assert captured.err.count("\n") == 1
    return captured.out
