"""The commands of packsaddle and of the lab, with their options, made from signatures and docstrings."""

import inspect
import re
import textwrap
from typing import Any, Literal, get_args, get_origin

from lab import __main__ as lab
from lab.bench import pieces
from lab.docs.generated import table
from lab.paper import __main__ as paper
from lab.race import __main__ as race
from packsaddle import cli
from packsaddle.cli.flags import Command, flags_of
from packsaddle.cli.parsing import Group, word_of
from packsaddle.options.describe import descriptions


def markdown() -> str:
    """Return one section for each command: its description, examples, and a table of its arguments."""
    parts = [_group(program.COMMANDS, program.PROGRAM) for program in (lab, pieces, race)]
    whole = [*_group(cli.COMMANDS, "packsaddle"), *(part for group in parts for part in group)]
    return "\n\n".join([*whole, *_command(paper.reproduce, paper.PROGRAM)])


def _group(group: Group, name: str) -> list[str]:
    parts: list[str] = []
    for word, command in group.commands.items():
        full = f"{name} {word}"
        if isinstance(command, Group):
            parts += [f"### {full}", command.about, *_group(command, full)]
        else:
            parts += _command(command, full)
    return parts


def _command(command: Command, name: str) -> list[str]:
    level = "####" if name.removeprefix("python -m ").count(" ") > 1 else "###"
    return [part for part in (f"{level} {name}", *_about(command), _arguments(command)) if part]


def _about(command: Command) -> list[str]:
    """Return the paragraphs of a command's docstring up to "Args:". Examples become a block of code."""
    paragraphs = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0].split("\n\n")
    return [_examples(p) if p.startswith("Examples:") else _quoted(" ".join(p.split())) for p in paragraphs]


def _quoted(text: str) -> str:
    """Return a text with its options, such as --out, marked as code, since Markdown would turn two dashes into one."""
    return re.sub(r"(?<![`\w])--[a-z][\w-]*", lambda found: f"`{found[0]}`", text)


def _examples(paragraph: str) -> str:
    return f"```text\n{textwrap.dedent(paragraph.partition(chr(10))[2])}\n```"


def _arguments(command: Command) -> str:
    texts = descriptions(command)
    rows = [
        [f"`{word_of(flag)}`", _value(flag.annotation), _default(flag.default), _quoted(texts.get(n, ""))]
        for n, flag in flags_of(command).items()
    ]
    return table(["argument", "value", "default", "meaning"], rows) if rows else ""


def _value(hint: Any) -> str:
    while hasattr(hint, "__metadata__"):
        hint = get_args(hint)[0]
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"any number of: {_value(get_args(hint)[0])}"
    others = [_value(h) for h in get_args(hint) if h is not type(None)]
    names = {"int": "integer", "float": "number", "str": "text", "Path": "path", "bool": "flag"}
    return ", ".join(others) if others else names[hint.__name__]


def _default(value: Any) -> str:
    if value is inspect.Parameter.empty:
        return "required"
    return "" if value is None or isinstance(value, bool) or value == () else f"`{value}`"
