"""Help: overviews without torch, the same text by every spelling, and options in groups."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from commandline import command, refused
from forked_python import python
from nightly import thinned

import packsaddle_command
from lab import __main__ as lab
from packsaddle import __version__
from packsaddle.cli import COMMANDS, commands, parsing
from packsaddle.cli.commands import Entry
from packsaddle.cli.flags import flags_of, groups_of

SOURCE = Path(packsaddle_command.__file__).parent
QUICK = (["--version"], [], ["-h"], ["--help"], ["help"], ["plan"], ["plan", "--help"], ["help", "plan"])


def interpreter(script: str, *words: str) -> list[str]:
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE)!r}); {script}", *words]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_overviews_and_the_version_import_no_torch(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """In a fresh interpreter; and the package's own command line prints the same."""
    report = "import packsaddle_command; packsaddle_command.main(); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(interpreter(report, *words), capture_output=True, text=True, check=True, timeout=60)
    modules = {"packsaddle_command", "packsaddle", "torch", "rich"} & {*done.stderr.split()}
    assert modules == {"packsaddle_command"}
    assert command(*words) == 0
    assert done.stdout == capsys.readouterr().out
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert __version__ in done.stdout or "plan" in words


def entries(table: Mapping[str, Entry], *names: str) -> Iterator[tuple[tuple[str, ...], str]]:
    for name, (summary, target) in table.items():
        yield (*names, name), summary
        if not isinstance(target, str):
            yield from entries(target, *names, name)


@pytest.mark.parametrize(
    ("group", "names", "summary"),
    [
        *(pytest.param(COMMANDS, n, s, id=" ".join(n)) for n, s in entries(commands.COMMANDS)),
        *(pytest.param(lab.COMMANDS, n, s, id=f"lab {n[0]}") for n, s in entries(lab.COMMANDS.commands.data)),
    ],
)
def test_summaries_are_the_first_lines_of_docstrings(
    group: parsing.Group, names: tuple[str, ...], summary: str
) -> None:
    entry: parsing.Command | parsing.Group = group
    for name in names:
        assert isinstance(entry, parsing.Group)
        entry = entry.commands[name]
    assert parsing.summary(entry) == summary


def test_only_the_module_of_the_command_is_imported() -> None:
    report = (
        "from packsaddle.cli import main; sys.argv[1:] = ['doctr']\ntry: main()\n"
        "except SystemExit: print(*(m for m in sys.modules if m.startswith('packsaddle.cli.')))"
    )
    done = subprocess.run(interpreter(report), capture_output=True, text=True, check=True, timeout=120)
    commands = ("certify_script", "compressors", "plan_theory", "plan_link", "doctor")
    assert not {f"packsaddle.cli.{name}" for name in commands} & {*done.stdout.split()}


@pytest.mark.parametrize("words", ["compressors", "plan link", "certify-script", "plan"])
def test_help_before_a_command_is_help_behind_it(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*words.split(), "--help") == 0
    expected = capsys.readouterr().out
    assert command("help", *words.split()) == 0
    assert capsys.readouterr().out == expected
    *group, last = words.split()
    assert command(*group, "help", last) == 0
    assert capsys.readouterr().out == expected
    refused(capsys, "unknown command paln (did you mean plan?)", "help", "paln")


FIRST = {
    "certify-script": ["epsilon", "hessian_lipschitz", "out"],
    "plan theory": ["d", "epsilon", "lipschitz_gradient"],
}


@pytest.mark.parametrize("words", FIRST)
def test_options_are_in_groups(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each flag in one group; help shows the groups in order, the common flags first."""
    entry: parsing.Command | parsing.Group = COMMANDS
    for name in words.split():
        assert isinstance(entry, parsing.Group)
        entry = entry.commands[name]
    assert not isinstance(entry, parsing.Group)
    groups, flags = groups_of(entry), flags_of(entry)
    listed = [name for names in groups.values() for name in names]
    positional = [n for n, f in flags.items() if f.kind is f.POSITIONAL_ONLY]
    assert sorted([*listed, *positional]) == sorted(flags)
    assert listed[:3] == FIRST[words]

    # The titles and flags shown.
    monkeypatch.setenv("COLUMNS", "80")
    command(*words.split(), "--help")
    shown = capsys.readouterr().out.partition("Examples:")[2].partition("\n\n")[2]
    found = re.findall(r"^(?:  --[\w-]+|(?:[\w ]+ )?options:)", shown, re.MULTILINE)
    expected = []
    for title, names in groups.items():
        expected += [f"{title} options:".strip(), *(f"  --{name.replace('_', '-')}" for name in names)]
    assert found == expected
    assert max(map(len, shown.splitlines())) <= 80


READ_IN_PART: dict[str, tuple[str, ...]] = {
    "overview": (),
    "help": ("plan", "link", "--help"),
    "table and lines": ("plan", "theory", "--d", "1000000", "--epsilon", "0.5"),
    "document": ("compressors", "--json"),
    "refusal": ("plan", "theory", "--d", "0", "--epsilon", "0.5"),
}


@pytest.mark.parametrize("name", thinned(READ_IN_PART, 2))
def test_a_reader_that_leaves_is_no_error(name: str) -> None:
    """As `| head` does: a real pipe whose reading end is closed, before anything is written."""
    read, write = os.pipe()
    os.close(read)
    program = sys.executable if name == "table and lines" else python()
    words = [program, "-W", "error", "-m", "packsaddle.cli", *READ_IN_PART[name]]
    if name == "overview":  # which the command prints before it imports the package
        words = interpreter("import packsaddle_command; packsaddle_command.main()")
    done = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True, timeout=180)
    os.close(write)
    if name == "refusal":  # nothing was to be printed there
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    else:
        assert (done.returncode, done.stderr) == (1, "")
