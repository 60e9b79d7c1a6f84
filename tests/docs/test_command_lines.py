"""The documentation's command lines: the real parser takes each, and knows every flag that is named in passing."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab import __main__ as lab
from lab.bench import pieces
from lab.paper.figure1 import figure1
from lab.paper.figure2 import figure2
from lab.paper.language import language
from lab.paper.table1 import table1
from lab.race import __main__ as race
from packsaddle import cli
from packsaddle.cli.flags import Command
from packsaddle.cli.parsing import Group, parse

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("docs/tutorials/*.md"))]
PAGES += [*sorted(ROOT.glob("experiments/*/*.md")), *sorted(ROOT.glob("lab/bench/*.md"))]
PROGRAMS: dict[str, Command | Group] = {
    "packsaddle": cli.COMMANDS,
    "packsaddle.cli": cli.COMMANDS,
    "lab.bench.pieces": pieces.COMMANDS,
    "lab.race": race.COMMANDS,
    **{f"lab.paper.{script.__name__}": script for script in (figure1, figure2, language, table1)},
    "lab": lab.COMMANDS,
}
MODULES = "|".join(map(re.escape, [*PROGRAMS][1:]))
PROGRAM = re.compile(rf"(?:(?:^|\s)(packsaddle)|-m ({MODULES}))(?: |$)")


EARLIER = re.compile(r"\b[Cc]ommit `?[0-9a-f]{7,}")  # commands after it, or in one paragraph with it, are that commit's


def current(page: Path, is_code: bool) -> str:
    """The page's code blocks, or the rest of it, without those that are of an earlier commit."""
    kept, before = [], ""
    for block in page.read_text().split("\n\n"):
        code = block.startswith("    ")
        if code == is_code and not EARLIER.search(before if code else block):
            kept.append(block)
        before = before if code else block
    return "\n\n".join(kept)


def command_lines(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The program and the arguments of each command in a code block, without comments and placeholders."""
    text = re.sub(r"\\\n\s*", " ", current(page, is_code=True))
    for line in re.findall(r"^ {4,}(?![-|*])(.*)$", text, re.MULTILINE):
        line = re.sub(r"\s#.*", "", line)
        found = PROGRAM.search(line)
        if found is None or line.startswith("pip "):
            continue
        arguments = [a for a in shlex.split(line[found.end() :].partition("(as above)")[0]) if a != "--"]  # torchrun's
        # A number in capitals, as in --batch N, is any.
        yield found[1] or found[2], ["1" if re.fullmatch("[A-Z]+", a) else a for a in arguments if a != "..."]


def inline_commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The program and the words of each command named in a sentence or a table."""
    outside = re.sub(r"^ {4,}[^\n]*$|```.*?```", "", current(page, is_code=False), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`((?:packsaddle|python -m lab[.\w]*) [a-z-][^`]*)`", outside):
        found = PROGRAM.search(code)
        if found is not None:
            yield found[1] or found[2], re.sub(r"[\[\]]", " ", code[found.end() :]).split()


def parsed(program: str, arguments: list[str]) -> Any:
    """The call that the arguments ask for, not made; None where they ask for help, which is printed."""
    try:
        return parse(PROGRAMS[program], arguments, program)
    except SystemExit as end:
        if end.code:
            raise
        return None


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_command_lines_parse(page: Path) -> None:
    for program, arguments in command_lines(page):
        parsed(program, arguments)  # raises ConfigError for what the parser does not take


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_flags_named_in_passing_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, words in inline_commands(page):
        if words[:1] == ["help"]:  # of any command
            continue
        entry, names = PROGRAMS[program], []
        while isinstance(entry, Group) and len(names) < len(words):
            for command in words[len(names)].split("|"):
                assert command in entry.commands, f"{program} {' '.join(words)}"
            names.append(words[len(names)].partition("|")[0])
            entry = entry.commands[names[-1]]
        flags = {word for word in words if word.startswith("--")}
        if flags:
            parsed(program, [*names, "--help"])
            known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert flags <= known, f"{program} {' '.join(words)}"


def test_there_are_commands_to_try() -> None:
    assert sum(1 for page in PAGES for _ in command_lines(page)) > 30
    assert sum(1 for page in PAGES for _ in inline_commands(page)) > 20
