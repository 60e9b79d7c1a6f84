"""The command line: `packsaddle` without arguments lists the commands."""

import os
import sys

from packsaddle.cli.commands import ABOUT, VERSION
from packsaddle.cli.commands import COMMANDS as ENTRIES
from packsaddle.cli.console import is_first, plain_text, print_table
from packsaddle.cli.flags import Command
from packsaddle.cli.parsing import Group, ImportedCommands, Seconds, parse
from packsaddle.comm.failures import PeerLostError, TerminatedError, WorkerFailedError
from packsaddle.comm.launching import under_launcher
from packsaddle.errors import ConfigError, GuardError
from packsaddle.messages import one_line

__all__ = [
    "COMMANDS",
    "Group",
    "ImportedCommands",
    "Seconds",
    "main",
    "plain_text",
    "print_table",
    "serve",
]


COMMANDS = Group(ABOUT, ImportedCommands(ENTRIES))


def main() -> None:
    serve(COMMANDS, "packsaddle")


def serve(commands: Command | Group, program: str) -> None:
    """Run the command that `sys.argv` names, and print its errors.

    Args:
        commands: the group that contains the command, or a single command.
        program: the program's name in error messages.

    Invalid input prints one line on stderr and exits with code 2. If the reader of the output has closed the pipe (as
    in `| head`), the program exits silently with code 1.
    """
    try:
        try:
            _run(commands, program)
        finally:
            sys.stdout.flush()  # flush here, since at exit a BrokenPipeError could not be caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _run(commands: Command | Group, program: str) -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"packsaddle {VERSION}")
        return
    try:
        parse(commands, sys.argv[1:], program)()
    except ConfigError as error:
        if is_first():
            print(f"{program}: error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except GuardError as error:
        if is_first():
            print(f"{program}: {error}", file=sys.stderr)
        sys.exit(1)
    except WorkerFailedError as error:
        print(error.trace, end="", file=sys.stderr)
        print(f"{program}: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    except TerminatedError:
        sys.exit(143)
    except PeerLostError as error:
        print(f"{program}: {one_line(str(error))}", file=sys.stderr, flush=True)
        os._exit(1)  # a normal exit would block on gloo's threads and on a store that is cut off from the network
    except KeyboardInterrupt:
        sys.exit(130)
    if under_launcher():
        # The work is done and on disk. An interpreter that ends normally while gloo's threads run may abort, which the
        # launcher would report as a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
