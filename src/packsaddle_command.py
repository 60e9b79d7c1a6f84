"""The console script `packsaddle`. It prints overviews, the version and the error of an unreadable configuration file
without importing torch, which takes seconds.

It is a module outside of the package, whose import would import torch.
"""

import os
import runpy
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def _run_module(name: str) -> dict[str, Any]:
    """Run a root module of packsaddle without importing the package, and return the module's names."""
    return runpy.run_path(str(Path(__file__).parent / "packsaddle" / f"{name}.py"))


VERSION = _run_module("version")["__version__"]


class Entry(NamedTuple):
    """A command (first line of its docstring, name of its module) or a group (description, entries by name)."""

    summary: str
    target: "str | Mapping[str, Entry]"


ABOUT = f"packsaddle {VERSION}: train on slow networks with the optimizer you have, and know where you have arrived."
COMMANDS: Mapping[str, Entry] = {
    "demo": Entry("Show compressed SGD leave a saddle on which plain SGD stalls.", "packsaddle.cli.run"),
    "init": Entry("Write a configuration file with a comment on every key.", "packsaddle.cli.run"),
    "run": Entry("Train from a TOML configuration, in one process or several.", "packsaddle.cli.run"),
    "certify": Entry("Certify a run's last point: saddle or second-order stationary.", "packsaddle.cli.certify"),
    "certify-script": Entry("Certify a checkpoint of your own training script.", "packsaddle.cli.certify_script"),
    "report": Entry("Compare runs: tables, figures and an HTML page.", "packsaddle.cli.report"),
    "compressors": Entry("List the compressors with their bytes and their speed.", "packsaddle.cli.report"),
    "plan": Entry(
        "Plan a run: parameters by theory, or step times on a link.",
        {
            "theory": Entry("Compute the parameters of Algorithm 1 from the theorems.", "packsaddle.cli.plan_theory"),
            "table": Entry("Print the paper's Table 1 for a given d and epsilon.", "packsaddle.cli.plan_theory"),
            "link": Entry("Find the compressor that trains fastest on a network link.", "packsaddle.cli.plan_link"),
        },
    ),
    "doctor": Entry("Check this machine's hardware, software and network.", "packsaddle.cli.doctor"),
    "completion": Entry("Print a script that completes commands and flags in a shell.", "packsaddle.cli"),
}


def main() -> None:
    """Print an overview or the version, or run `packsaddle.cli.main`; exit code 130 if Ctrl-C stops its import.
    Prints one line on stderr, with exit code 2, if `packsaddle run` cannot read its configuration file."""
    text, error = _answer(sys.argv[1:]), _unreadable(sys.argv[1:])
    if error is not None:
        print(f"packsaddle: error: {error}", file=sys.stderr)
        sys.exit(2)
    if text is None:
        try:
            from packsaddle.cli import main as command_line
        except KeyboardInterrupt:
            sys.exit(130)
        command_line()
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head`: without this, the interpreter would print the error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _answer(words: Sequence[str]) -> str | None:
    """Return the version, or the overview of the program or of a group, as text; None for any other `words`."""
    if [*words] == ["--version"]:
        return f"packsaddle {VERSION}"
    name, about, entries, rest = "packsaddle", ABOUT, COMMANDS, asked_for_help(words)
    while rest and rest[0] in entries:
        name, about, target = f"{name} {rest[0]}", *entries[rest[0]]
        if isinstance(target, str):
            return None
        entries, rest = target, rest[1:]
    summaries = {word: entry.summary for word, entry in entries.items()}
    return overview(about, summaries, name) if rest in ([], ["-h"], ["--help"]) else None


def _unreadable(words: Sequence[str]) -> str | None:
    """Return the error of the file in `run FILE ...` if it does not exist or is not valid TOML; else None.

    Other spellings are left to the package, and so are workers of a launcher, of which one prints, and pipes, which can
    be read only once.
    """
    if words[:1] != ["run"] or len(words) < 2 or words[1].startswith("-") or {"-h", "--help"} & {*words}:
        return None
    file = words[1]
    if "RANK" in os.environ or (os.path.exists(file) and not os.path.isfile(file)):
        return None
    errors = _run_module("errors")
    try:
        errors["read_toml"](Path(file))
    except errors["ConfigError"] as error:
        message: str = _run_module("messages")["one_line"](str(error))
        return message
    return None


def asked_for_help(words: Sequence[str]) -> list[str]:
    """Return the words of a command line; if the first is `help`, it is moved to the end, as --help."""
    return [*words[1:], "--help"] if words and words[0] == "help" else [*words]


def overview(about: str, summaries: Mapping[str, str], name: str) -> str:
    """Return the help text of a group of commands: its description, and each command's summary, in 80 columns."""
    width = max(map(len, summaries))
    lines = [f"  {word:<{width}}  {summary}" for word, summary in summaries.items()]
    last = f"{name} COMMAND --help: the options of a command, with examples."
    return "\n".join([textwrap.fill(about, 80), "", f"usage: {name} COMMAND ...", "", *lines, "", last])
