"""The words of a command line: every mistake is one line with the nearest valid word, and help teaches by examples."""

import dataclasses
import inspect
import re
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from commandline import LAB, command, refused

from lab import __main__ as lab
from lab.bench import pieces
from lab.paper.figure1 import figure1
from lab.paper.figure2 import figure2
from lab.paper.language import language
from lab.paper.table1 import table1
from lab.race import __main__ as race
from packsaddle.cli import COMMANDS, parsing
from packsaddle.cli.flags import flags_of
from packsaddle.cli.parsing import Group, parse
from packsaddle.theory import Assumptions

MISTAKES = {
    "paln": "unknown command paln (did you mean plan?)",
    "zebra": "unknown command zebra (there is certify-script, compressors, ",
    "lab dmeo": "unknown command dmeo (did you mean demo?)",
    "'two words'": "unknown command 'two words' (there is ",
    "--verison": "unknown flag --verison (did you mean --version?)",
    "lab.race --workers 2 train": "unknown flag --workers (flags come after a command: train, clock, ",
    "lab.race train --out x.csv": "train: missing --text",
    "lab.race train --wrokers 2": "train: unknown flag --wrokers (did you mean --workers?)",
    "lab.race tables x.csv --zzz 0.1": "tables: unknown flag --zzz (see --help)",
    "lab.race tables x.csv y.csv": "tables: unexpected argument y.csv",
    "lab.race tables x.csv 'a\nb'": r"tables: unexpected argument 'a\nb'",
    "lab.race train --batch two": "train: --batch must be a whole number, got 'two'",
    "lab.race train --batch": "train: --batch: expected one argument",
    "lab.race train --batch 2 3": "train: unexpected argument 3",
    "plan link 1gbit --compute 55msec": "plan link: --compute must be seconds such as 30, 55ms or 2min, got '55msec'",
    "plan theory --mode theorie": "plan theory: --mode must be one of practical, theory, got 'theorie' (did you mean ",
    "plan table --zebra": "plan table: unknown flag --zebra (see --help)",
    "plan --link 100mbit --model resnet18": "plan: unknown flag --link (did you mean link?)",
    "plan --d 1M --epsilon 0.2": "plan: unknown flag --d (flags come after a command: theory, table, link)",
    "plan theory": "plan theory: missing --d, --epsilon",
    "plan theory --epsilon 0.2 --d 10 --f-max -1": "--f-max must be positive, from 1e-20 to 1e+20, got -1.0",
    "lab.paper.figure2 opne": "escape, got 'opne' (did you mean open?)",
    "lab.bench.pieces stp": "unknown command stp (did you mean step?)",
    "plan link 1gbit --d 1M --sigma 5": "plan link: unknown flag --sigma (see --help)",
    "plan link 1gbit --d 1M --mode theory": "plan link: unknown flag --mode (did you mean --model?)",
    "compressors --ratio 2": "ratio of RandomK must be in (0, 1], got 2.0",
    "compressors --d 0": "d and workers must be at least 1, got 0 and 4",
}


@pytest.mark.parametrize(("words", "message"), MISTAKES.items(), ids=MISTAKES)
def test_mistakes_are_one_line(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, message, *shlex.split(words)) == ""


def test_a_flag_of_several_values_may_be_given_several_times() -> None:
    def work(*, set: tuple[str, ...] = (), rates: tuple[float, ...] = (), scale: str = "a", only: str = "") -> None:
        """Do.

        Args:
            set: Several.
            rates: Several.
            scale: One.
            only: One.
        """
        found.append((set, rates, scale, only))

    found: list[Any] = []
    for words in (
        "--set a=1 b=2 --set c=3 --scale x --rates 1 --rates -2 3",
        "--rates=1 --set a=1 --scale x --set=b=2 --rates -2 3 --set c=3",
        "--scale x --set a=1 b=2 c=3 --rates 1 -2 3",
    ):
        parse(Group("", {"work": work}), ["work", *words.split()], "packsaddle")()
    assert found == [(("a=1", "b=2", "c=3"), (1.0, -2.0, 3.0), "x", "")] * 3


def test_without_a_command_there_is_an_overview(capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 0
    shown = capsys.readouterr().out
    for name, entry in COMMANDS.commands.items():
        assert f"\n  {name} " in shown
        assert parsing.summary(entry) in shown
    for arguments in (("--help",), ("-h",)):
        assert command(*arguments) == 0
        assert capsys.readouterr().out == shown
    assert command("lab.bench.pieces") == 0
    assert "\n  exchange  Time one exchange" in capsys.readouterr().out


def leaves(entry: Callable[..., Any] | Group, *names: str) -> Iterator[tuple[tuple[str, ...], Callable[..., Any]]]:
    if isinstance(entry, Group):
        for name, inner in entry.commands.items():
            yield from leaves(inner, *names, name)
    else:
        yield names, entry


PROGRAMS: dict[str, Callable[..., Any] | Group] = {
    "packsaddle": COMMANDS,
    "lab.bench.pieces": pieces.COMMANDS,
    "lab.race": race.COMMANDS,
    "lab": lab.COMMANDS,
    **{f"lab.paper.{script.__name__}": script for script in (figure1, figure2, language, table1)},
}
LEAVES = {
    **dict(leaves(COMMANDS)),
    **{(name, *words): entry for name in LAB for words, entry in leaves(PROGRAMS[name])},
}


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_help_has_examples_that_parse(names: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*names, "--help") == 0
    shown = capsys.readouterr().out
    assert parsing.summary(LEAVES[names]) in shown
    examples = shown.partition("\nExamples:\n")[2].partition("\n\n")[0].splitlines()
    assert examples
    for example in examples:
        program = next((name for name in LAB if f"-m {name} " in example), "packsaddle")
        words = shlex.split(re.split(rf"{program}(?:\.cli)? ", example, maxsplit=1)[1], comments=True)
        redirected = words[: words.index(">")] if ">" in words else words
        assert [*(program,) * (program in LAB), *redirected][: len(names)] == [*names]
        assert callable(parse(PROGRAMS[program], redirected, program))


@pytest.mark.parametrize("names", LEAVES, ids=" ".join)
def test_help_describes_every_flag(
    names: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No flag stands without words, no default reads None, and paragraphs keep within the terminal."""
    monkeypatch.setenv("COLUMNS", "200")
    command(*names, "--help")
    shown = capsys.readouterr().out
    assert "None" not in shown
    rows = re.findall(r"^  (--.*(?:\n {20,}.*)*)", shown, re.MULTILINE)
    for row in rows:
        assert re.search(r"(  |\n).*\w", row), row
    monkeypatch.setenv("COLUMNS", "60")
    command(*names, "--help")
    for paragraph in capsys.readouterr().out.partition("Examples:")[0].split("\n\n")[2:]:
        assert all(len(line) <= 60 for line in paragraph.splitlines())


def test_a_plan_has_the_fields_of_its_assumptions_as_flags() -> None:
    """Required ones without a default; the others with that of the class."""
    group = COMMANDS.commands["plan"]
    assert isinstance(group, Group)
    flags = flags_of(group.commands["theory"])
    fields = {f.name: f.default for f in dataclasses.fields(Assumptions)}
    assert flags.keys() == fields.keys() | {"compressor", "ratio", "mode", "workers", "json"}
    required = {n for n, flag in flags.items() if flag.default is inspect.Parameter.empty}
    assert required == {n for n, default in fields.items() if default is dataclasses.MISSING}
    assert all(flags[n].default == default for n, default in fields.items() if n not in required)
