"""The command line, run in this process."""

import sys
from typing import Any

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
