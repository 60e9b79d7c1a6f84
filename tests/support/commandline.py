"""The command line, run in this process."""

import sys
from typing import Any

import pytest

from packsaddle import cli


def command(*arguments: Any) -> int:
    """Run `packsaddle` with these arguments and return its exit code."""
    before, sys.argv = sys.argv, ["packsaddle", *map(str, arguments)]
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = before
    return 0


def refused(capsys: pytest.CaptureFixture[str], message: str, *arguments: Any) -> str:
    """Assert that these arguments give code 2 and one line with the message; return what was printed as a result."""
    assert command(*arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("packsaddle: error: ")
    assert captured.err.count("\n") == 1
    return captured.out
