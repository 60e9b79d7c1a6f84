"""The script that lets a shell complete the commands and their flags."""

import io
from contextlib import redirect_stdout, suppress
from typing import Literal

from tyro.extras import SubcommandApp

from packsaddle.commands.parsing import MARKERS, Group, deferred

Shell = Literal["bash", "zsh", "fish"]

# tyro completes files where a flag takes one, but not in place of a positional argument; with these, its scripts do.
_FILES_TOO: dict[Shell, tuple[str, str]] = {
    "bash": ("complete -F", "complete -o default -F"),
    "zsh": ("completion_array\n}", "completion_array || _files\n}"),
    "fish": ("complete --no-files", "complete"),
}


def script(group: Group, name: str, shell: Shell) -> str:
    """Return the script, as tyro writes it, but that names of files are completed too."""
    written = io.StringIO()
    with redirect_stdout(written), suppress(SystemExit):
        _app(group).cli(prog=name, args=["--tyro-print-completion", shell], config=MARKERS)
    return written.getvalue().replace(*_FILES_TOO[shell])


def _app(group: Group) -> SubcommandApp:
    app = SubcommandApp()
    for word, command in group.commands.items():
        if isinstance(command, Group):
            app.command(_app(command), name=word, help=command.about)
        else:
            app.command(name=word)(deferred(command))
    return app
