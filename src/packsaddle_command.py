"""The console script. It is outside the package, so that Ctrl-C ends the package's import, of seconds, quietly."""

import sys


def main() -> None:
    """Run `packsaddle.cli.main`; exit with code 130 if the import is interrupted."""
    try:
        from packsaddle.cli import main as command_line
    except KeyboardInterrupt:
        sys.exit(130)
    command_line()
