"""A Sphinx extension: reference tables that are made from the code when the site is built.

The directives `generated-commands`, `generated-compressors` and `generated-compressor-classes` insert what the
functions of these names return: the commands of packsaddle and of the lab with their options, made from signatures and
docstrings, and the table and the reference of all compressors, with computed numbers.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args, get_origin

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from lab import __main__ as lab
from lab.bench import pieces
from lab.paper.figure1 import figure1
from lab.paper.figure2 import figure2
from lab.paper.language import language
from lab.paper.table1 import table1
from lab.race import __main__ as race
from packsaddle import cli
from packsaddle.cli.flags import Command, flags_of
from packsaddle.cli.parsing import Group, word_of
from packsaddle.comm.select_aggregator import choose
from packsaddle.compressors import Compressor
from packsaddle.compressors.registry import CLASSES, variants
from packsaddle.options.describe import descriptions

_D, _WORKERS, _RATIO = 1_000_000, 4, 0.01  # the setting of the table of compressors


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. Line breaks in cells are replaced by spaces, and bars are escaped."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """Return the Markdown of a table's cell: one line, in which bars, and outside of code also * and <, are escaped."""
    pieces = re.split(r"(`[^`]*`)", " ".join(text.split()).replace("|", "\\|"))
    return "".join(p if p.startswith("`") else re.sub(r"([*<])", r"\\\1", p) for p in pieces)


def directive(markdown: Callable[[], str]) -> type[SphinxDirective]:
    """Return a Sphinx directive that inserts the Markdown text which a function returns, including its headings."""

    class Inserted(SphinxDirective):
        def run(self) -> list[nodes.Node]:
            self.env.note_reread()  # rebuild the page every time, since it depends on the code and not on its file
            lines = StringList(markdown().splitlines(), source=markdown.__module__)
            parent = nodes.Element()
            self.state.nested_parse(lines, self.content_offset, parent, match_titles=True)
            return list(parent.children)

    return Inserted


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives. Sphinx calls this."""
    for markdown in (commands, compressors, compressor_classes):
        app.add_directive(f"generated-{markdown.__name__.replace('_', '-')}", directive(markdown))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def commands() -> str:
    """Return one section for each command: its description, examples, and a table of its arguments."""
    parts = _group(cli.COMMANDS, "packsaddle")
    for program in (lab, pieces, race):
        parts += _group(program.COMMANDS, program.PROGRAM)
    for script in (figure1, figure2, language, table1):
        parts += _command(script, f"python -m {script.__module__}")
    return "\n\n".join(parts)


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
    return [part for part in (f"{level} {name}", *_about(command), _table_of_arguments(command)) if part]


def _about(command: Command) -> list[str]:
    """Return the paragraphs of a command's docstring up to "Args:". Examples become a block of code."""
    paragraphs = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0].split("\n\n")
    return [_examples(p) if p.startswith("Examples:") else _quoted(" ".join(p.split())) for p in paragraphs]


def _quoted(text: str) -> str:
    """Return a text with its options, such as --out, marked as code, since Markdown would turn two dashes into one."""
    return re.sub(r"(?<![`\w])--[a-z][\w-]*", lambda found: f"`{found[0]}`", text)


def _examples(paragraph: str) -> str:
    return f"```text\n{textwrap.dedent(paragraph.partition(chr(10))[2])}\n```"


def _table_of_arguments(command: Command) -> str:
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


def compressors() -> str:
    """Return a table of all compressors: arguments, contraction mu, message, exchange, and bytes in one setting."""
    rows = []
    for name, cls in CLASSES.items():
        c = variants(cls, _RATIO)[0]
        choice = choose(c, "direct", d=_D, dense=0, workers=_WORKERS)
        sent = choice.aggregator.wire(_D, 0, 1, _WORKERS, 4).sent
        linear = "yes" if c.linear else "no"
        rows.append(
            [
                f"`{name}({_arguments_of(cls)})`",
                c.summary.mu,
                c.summary.message,
                linear,
                choice.name,
                f"{sent / 1e3:,.1f}",
            ]
        )
    setting = f"kB: sent by each of {_WORKERS} workers in a step, for {_D:,} coordinates and a ratio of {_RATIO:.0%}."
    return table(["compressor", "mu", "message", "linear", "averaged by", "kB"], rows) + f"\n\n{setting}"


def compressor_classes() -> str:
    """Return the reference pages' text: a directive for each compressor's class, which inserts its docstring."""
    return "\n\n".join(["```{eval-rst}", *(f".. autoclass:: packsaddle.{name}" for name in CLASSES), "```"])


def _arguments_of(cls: type[Compressor]) -> str:
    assert dataclasses.is_dataclass(cls)
    shown = [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]
    return ", ".join(f.name if f.default in (None, dataclasses.MISSING) else f"{f.name}={f.default!r}" for f in shown)
