"""The console script `packsaddle`. It prints overviews and the version without importing torch, which takes seconds.

It is a module outside of the package, whose import would import torch.
"""

import os
import runpy
import sys
from pathlib import Path

_COMMANDS = Path(__file__).parent / "packsaddle" / "cli" / "commands.py"


def main() -> None:
    """If the command line asks for an overview of the commands or for the version, print it without importing torch.
    Otherwise run `packsaddle.cli.main`. If Ctrl-C interrupts the import of `packsaddle.cli`, the exit code is 130."""
    text = runpy.run_path(str(_COMMANDS))["answer"](sys.argv[1:])
    if text is None:
        try:
            from packsaddle.cli import main as command_line
        except KeyboardInterrupt:
            sys.exit(130)
        command_line()
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader closed the pipe (`| head`): discard the output, or a flush at exit would fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
