"""The command line: `packsaddle` by itself lists the commands."""

import os
import select
import sys
from typing import Annotated, TextIO

import tyro

import packsaddle
from packsaddle.cli import certify, certify_script, doctor, plan_link, plan_theory, report, run
from packsaddle.cli.console import dated, is_first, plain_text, print_table, require_plots
from packsaddle.cli.flags import Command
from packsaddle.cli.parsing import UNSAID, Group, Seconds, Shell, parse, script
from packsaddle.comm.failures import PeerLostError, TerminatedError, WorkerFailedError
from packsaddle.comm.launching import under_launcher
from packsaddle.errors import ConfigError, GuardError
from packsaddle.messages import one_line

__all__ = [
    "COMMANDS",
    "UNSAID",
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
    """Print a script that lets a shell complete commands, flags and names of files.

    Examples:
        packsaddle completion bash > ~/.local/share/bash-completion/completions/packsaddle
        packsaddle completion zsh > ~/.zfunc/_packsaddle       (with fpath+=~/.zfunc before compinit)
        packsaddle completion fish > ~/.config/fish/completions/packsaddle.fish

    Args:
        shell: For which shell.
    """
    print(script(COMMANDS, "packsaddle", shell))


COMMANDS = Group(
    f"packsaddle {packsaddle.__version__}: train on slow networks with the optimizer you have, and know where you have "
    "arrived",
    {
        "demo": run.demo,
        "init": run.init,
        "run": run.run,
        "certify": certify.certify,
        "certify-script": certify_script.certify_script,
        "report": report.report,
        "compressors": report.compressors,
        "plan": Group(
            "Plan a run: its parameters by the theorems, or the time of its steps on a link",
            {"theory": plan_theory.theory, "table": plan_theory.table, "link": plan_link.link},
        ),
        "doctor": doctor.doctor,
        "completion": completion,
    },
)


def main() -> None:
    """Run the command that `packsaddle` was given; the entry point of the console script."""
    serve(COMMANDS, "packsaddle")


def serve(commands: Command | Group, program: str) -> None:
    """Run what `sys.argv` asks of `commands`: bad input is one line on stderr and exit code 2.

    If the reader of its output has closed the pipe (`| head`), the process ends quietly with code 1, as Python's
    documentation of SIGPIPE recommends. `program` is the name in messages and help.
    """
    _open_streams()
    try:
        try:
            _obey(commands, program)
        finally:
            sys.stdout.flush()  # else the interpreter does, and complains, when nothing can catch it
    except BrokenPipeError:
        if not _silence_unread():  # some other pipe
            raise
        sys.exit(1)


def _open_streams() -> None:
    """Point standard streams that were closed before the start (`>&-`), which Python has not opened, to nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 -- for as long as the process lives


def _silence_unread() -> bool:
    """Point standard streams whose reader has gone to nowhere, for what their buffers hold; return whether there are
    any."""
    unread = [stream.fileno() for stream in (sys.stdout, sys.stderr) if _is_unread(stream)]
    for number in unread:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
    return bool(unread)


def _is_unread(stream: TextIO) -> bool:
    try:
        number = stream.fileno()
    except OSError:  # something in memory that stands in for it
        return False
    if not hasattr(select, "poll"):  # Windows
        return True
    poll = select.poll()
    poll.register(number, 0)  # an error is reported unasked: of a pipe's writing end, that no reader is left
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))  # of a socket: POLLHUP


def _obey(commands: Command | Group, program: str) -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"packsaddle {packsaddle.__version__}")
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
        if not error.trace and _is_unread(sys.stdout):  # a worker that prints found that its reader has left
            raise BrokenPipeError from None
        print(error.trace, end="", file=sys.stderr)
        print(f"{program}: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    except TerminatedError:
        sys.exit(143)
    except PeerLostError as error:
        print(f"{program}: {one_line(str(error))}", file=sys.stderr, flush=True)
        os._exit(1)  # what gloo's threads and a store behind a cut network wait for would be waited for here
    except KeyboardInterrupt:
        sys.exit(130)
    if under_launcher():
        # The work is done and on disk. Interpreters that take themselves apart while gloo's threads run abort now and
        # then, which the launcher would report as a failed run.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
