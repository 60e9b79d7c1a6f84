"""The command line: `packsaddle` without arguments lists the commands."""

import os
import select
import sys
from typing import Annotated, TextIO

import tyro

from packsaddle.cli.console import dated, is_first, plain_text, print_table, require_plots
from packsaddle.cli.flags import Command
from packsaddle.cli.parsing import HIDE_DEFAULT, Group, ImportedCommands, Seconds, Shell, parse, script
from packsaddle.comm.failures import PeerLostError, TerminatedError, WorkerFailedError
from packsaddle.comm.launching import under_launcher
from packsaddle.errors import ConfigError, GuardError
from packsaddle.messages import one_line
from packsaddle_command import ABOUT, VERSION
from packsaddle_command import COMMANDS as ENTRIES

__all__ = [
    "COMMANDS",
    "HIDE_DEFAULT",
    "Group",
    "Seconds",
    "dated",
    "main",
    "plain_text",
    "print_table",
    "require_plots",
    "serve",
]


def completion(shell: Annotated[Shell, tyro.conf.Positional]) -> None:
    """Print a script that completes commands and flags in a shell.

    Examples:
        packsaddle completion bash > ~/.local/share/bash-completion/completions/packsaddle
        packsaddle completion zsh > ~/.zfunc/_packsaddle       (with fpath+=~/.zfunc before compinit)
        packsaddle completion fish > ~/.config/fish/completions/packsaddle.fish

    Args:
        shell: The shell that will read the script.
    """
    print(script(COMMANDS, "packsaddle", shell))


COMMANDS = Group(ABOUT, ImportedCommands(ENTRIES))


def main() -> None:
    serve(COMMANDS, "packsaddle")


def serve(commands: Command | Group, program: str) -> None:
    """Run the command in `sys.argv`, one of `commands` of `program`. Invalid input prints one line on stderr, with exit
    code 2. Exits silently with code 1 if the reader of the output has closed the pipe (`| head`)."""
    # Streams that were closed before the start (`>&-`) are None: redirect them to os.devnull.
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 -- for as long as the process lives
    try:
        try:
            _run(commands, program)
        finally:
            sys.stdout.flush()  # at exit a BrokenPipeError could not be caught
    except BrokenPipeError:
        # Redirect the streams whose pipe has no reader, so that they can be flushed at exit.
        unread = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
        if not unread:  # the error is not from stdout or stderr
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for number in unread:
            os.dup2(nowhere, number)
        sys.exit(1)


def _is_unread(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except OSError:  # an in-memory replacement of the stream
        return False
    if not hasattr(select, "poll"):  # Windows, where this cannot be tested
        return True
    poll = select.poll()
    poll.register(number, 0)  # reports POLLERR, as always: the pipe has no reader
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))  # POLLHUP: of a socket


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
        if not error.trace and _is_unread(sys.stdout):  # a worker printed to the closed pipe
            raise BrokenPipeError from None
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
