"""The table of the commands, and the overviews that are printed from it.

This file imports no other file of the package, since `packsaddle_command` runs it by itself: the import of the package
would import torch.
"""

import runpy
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

# Read the version from its file, since importing the package would import torch.
VERSION = runpy.run_path(str(Path(__file__).parents[1] / "version.py"))["__version__"]


class Entry(NamedTuple):
    """An entry in the table of commands.

    For a command, `summary` is the first line of its docstring, and `target` is the name of its module. For a group of
    commands, `summary` is a description of the group, and `target` maps the names of its commands to their entries.
    """

    summary: str
    target: "str | Mapping[str, Entry]"


ABOUT = f"packsaddle {VERSION}: train on slow networks with the optimizer you have, and know where you have arrived."
COMMANDS: Mapping[str, Entry] = {
    "certify-script": Entry("Certify a checkpoint of your own training script.", "packsaddle.cli.certify_script"),
    "compressors": Entry("List the compressors with their bytes and their speed.", "packsaddle.cli.compressors"),
    "plan": Entry(
        "Plan a run: parameters by theory, or step times on a link.",
        {
            "theory": Entry("Compute the parameters of Algorithm 1 from the theorems.", "packsaddle.cli.plan_theory"),
            "table": Entry("Print the paper's Table 1 for a given d and epsilon.", "packsaddle.cli.plan_theory"),
            "link": Entry("Find the method that trains fastest on a network link.", "packsaddle.cli.plan_link"),
        },
    ),
    "doctor": Entry("Check this machine's hardware, software and network.", "packsaddle.cli.doctor"),
}


def answer(words: Sequence[str]) -> str | None:
    """Return the text that answers the command line `words` without importing torch. It is the version for --version,
    and the overview if `words` ask for help on the program or on a group of commands, or are empty. Returns None for
    any other command line."""
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


def asked_for_help(words: Sequence[str]) -> list[str]:
    """Return `words`, the words of a command line. If the first word is `help`, replace it by --help at the end."""
    return [*words[1:], "--help"] if words and words[0] == "help" else [*words]


def overview(about: str, summaries: Mapping[str, str], name: str) -> str:
    """Return the help text of a group of commands: its description, and each command's summary, in 80 columns."""
    width = max(map(len, summaries))
    lines = [f"  {word:<{width}}  {summary}" for word, summary in summaries.items()]
    last = f"{name} COMMAND --help: the options of a command, with examples."
    return "\n".join([textwrap.fill(about, 80), "", f"usage: {name} COMMAND ...", "", *lines, "", last])
