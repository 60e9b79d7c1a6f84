"""From the words of a command line to a call; every mistake is one line that names the nearest valid word.

tyro parses a command's flags by its signature, and writes its help and the scripts that complete it in a shell. Its
errors are boxes of many lines: `_one_line` makes one line of their text, and of the errors that it recognizes one in
our words.
"""

import functools
import inspect
import io
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_origin

import tyro
from tyro.extras import SubcommandApp

from packsaddle.cli.flags import Command, arguments_of, flags_of
from packsaddle.errors import ConfigError
from packsaddle.options.describe import descriptions
from packsaddle.options.numerals import real, seconds, whole
from packsaddle.options.schema import nearest

# Numbers may be written 1e6, 25M or 1%.
NUMBERS = tyro.constructors.ConstructorRegistry()


@NUMBERS.primitive_rule
def _numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    if info.type is int:
        return _number(int, whole, "INT", "a whole number")
    return _number(float, real, "FLOAT", "a number") if info.type is float else None


def _number(
    cls: type, convert: Callable[[str], Any], metavar: str, kind: str
) -> tyro.constructors.PrimitiveConstructorSpec[Any]:
    def read(words: list[str]) -> Any:
        try:
            return convert(words[0])
        except ValueError:
            raise ValueError(f"must be {kind}, got {words[0]!r}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, cls),
        str_from_instance=lambda value: [str(value)],
    )


# A float parameter in seconds, which may be written with a unit.
Seconds = Annotated[float, _number(float, seconds, "SECONDS", "seconds such as 30, 55ms or 2min")]

MARKERS = (
    tyro.conf.DisallowNone,  # what may be left out is left out, not given as None
    tyro.conf.FlagCreatePairsOff,  # --serial, without --no-serial
    tyro.conf.PositionalMetavarFromFieldName,
)
UNSAID = tyro.conf.arg(help_behavior_hint="")  # for a default that the help says in words


@dataclass(frozen=True)
class Group:
    """Commands under one word."""

    about: str
    commands: Mapping[str, "Command | Group"]

    def overview(self, name: str) -> str:
        """Return what `packsaddle` says when it is asked for nothing: the commands, one line each."""
        width = max(map(len, self.commands))
        lines = [f"  {word:<{width}}  {summary(command)}" for word, command in self.commands.items()]
        last = f"{name} COMMAND --help says what a command takes, with examples."
        return "\n".join([self.about, "", f"usage: {name} COMMAND ...", "", *lines, "", last])


def summary(command: Command | Group) -> str:
    """Return the line that describes a command."""
    return (command.about if isinstance(command, Group) else inspect.getdoc(command) or "").partition("\n")[0]


def parse(group: Command | Group, words: Sequence[str], name: str) -> Callable[[], Any]:
    """Return the call that `words`, which follow `name` on the command line, ask of a command or a group.

    Raises ConfigError if they cannot be parsed, and SystemExit after printing help.
    """
    if not isinstance(group, Group):
        return _parse_flags(group, words, name)
    if not words or words[0] in ("-h", "--help"):
        return functools.partial(print, group.overview(name))
    word, *rest = words
    if word not in group.commands:
        if word.startswith("-"):
            hint = nearest(word, ["--help", "--version", *group.commands])
            hint = hint or f" (flags come after a command: {', '.join(group.commands)})"
            raise ConfigError(f"{_subject(name)}unknown flag {_shown(word)}{hint}")
        hint = nearest(word, group.commands) or f" (there is {', '.join(group.commands)})"
        raise ConfigError(f"{_subject(name)}unknown command {_shown(word)}{hint}")
    return parse(group.commands[word], rest, f"{name} {word}")


def _parse_flags(command: Command, words: Sequence[str], name: str) -> Callable[[], Any]:
    words, said = _joined(command, words), io.StringIO()
    if not {"-h", "--help"} & {*words}:
        _check_flags(command, words, name)

    # tyro prints its errors and exits: the printed text becomes one line.
    try:
        with redirect_stderr(said), _unwrapped(words):
            call: Callable[[], Any] = tyro.cli(
                deferred(command),
                prog=name,
                description=_description(command),
                args=words,
                config=MARKERS,
                registry=NUMBERS,
            )
            return call
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_subject(name)}{_one_line(said.getvalue(), words)}") from None


def _joined(command: Command, words: Sequence[str]) -> list[str]:
    """Put together what a flag of several values is given in several places, of which tyro would take the last."""
    tuples = [name for name, flag in flags_of(command).items() if get_origin(flag.annotation) is tuple]
    several = {f"--{name.replace('_', '-')}" for name in tuples}
    values: dict[str, list[str]] = {}
    others: list[str] = []
    place, repeated = others, False

    # A value belongs to the last flag before it.
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-")
        if flag in several:
            repeated |= flag in values
            place = values.setdefault(flag, [])
            place += [value] * bool(equals)
        else:
            place = others if re.match("--?[a-z]", word) else place
            place.append(word)
    return [*others, *(word for flag, given in values.items() for word in (flag, *given))] if repeated else list(words)


def _description(command: Command) -> str:
    """Return the part of a docstring before its arguments, with examples."""
    first, *others = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0].split("\n\n")
    width = shutil.get_terminal_size().columns
    # tyro would unwrap lines that begin with a letter, and leave them to the terminal
    wrapped = (p if p.startswith("Examples:") else textwrap.fill(p, width, subsequent_indent=" ") for p in others)
    return "\n\n".join([first, *wrapped])


def deferred(command: Command) -> Command:
    """Return a function of the command's flags that returns the call to be made, as a class does by itself.

    Where the default is nothing, or off, its help does not repeat it.
    """
    if inspect.isclass(command):
        return command
    flags, texts = flags_of(command), descriptions(command)
    for name, flag in flags.items():
        if flag.default is None or isinstance(flag.default, bool) or flag.default == ():
            flags[name] = flag.replace(annotation=Annotated[flag.annotation, UNSAID])
    signature = inspect.Signature(list(flags.values()))

    def later(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(command, **arguments_of(command, signature.bind(*args, **kwargs).arguments))

    # tyro reads docstring, name, annotations and signature.
    about = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
    later.__doc__ = "\n    ".join([f"{about}\n\nArgs:", *(f"{name}: {texts[name]}" for name in flags if name in texts)])
    later.__name__, later.__annotations__ = command.__name__, {name: flag.annotation for name, flag in flags.items()}
    later.__signature__ = signature  # type: ignore[attr-defined]
    return later


@contextmanager
def _unwrapped(words: Sequence[str]) -> Iterator[None]:
    """Let tyro write errors on lines of any length, so that it breaks no word; help keeps the terminal's width."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & {*words}:
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


def _check_flags(command: Command, words: Sequence[str], name: str) -> None:
    """Raise ConfigError for an unknown flag: tyro would rather report the argument that it displaced."""
    flags = _flags(command)
    for word in words:
        flag = word.partition("=")[0]
        if word.startswith("--") and flag.replace("_", "-") not in {*flags, "--"}:
            other = " (keys of the configuration go through --set key=value)" if "--set" in flags else " (see --help)"
            raise ConfigError(f"{_subject(name)}unknown flag {_shown(flag)}{nearest(flag, flags) or other}")


def _flags(command: Command) -> list[str]:
    """Return its own flags; those that are on by default are turned off by --no-NAME."""
    parameters = flags_of(command).values()
    positional = [p for p in parameters if tyro.conf.Positional in getattr(p.annotation, "__metadata__", ())]
    names = [f"{'no-' * (p.default is True)}{p.name}" for p in parameters if p not in positional]
    return [f"--{name.replace('_', '-')}" for name in names]


# The text of tyro's errors, and what replaces it. Another version's wording is printed as it is.
_ERRORS = (
    (r"Error parsing (\S+): (?:.*(?:'>|\)\]): )?(must be .*)", r"\1 \2"),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value after it"),
    (r"Missing from [^:]*: (.*) \(required\)", r"missing \1"),
    (r"(must be [^']*?), (got '.*') - typing\.Literal\['(\w+)'\]:.*", r"\1 or \3, \2"),  # a number or a word
)


def _one_line(text: str, words: Sequence[str]) -> str:
    """Return an error of tyro's as one line, without box, title and trailer."""
    lines = [line.strip(" │|") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match(r"[─╭╰]|\+-|----", line)]
    first = rules[0] + 1 if rules else 0  # the title is in or above the first rule
    text = " ".join(line for i, line in enumerate(lines) if line and i >= first and i not in rules)
    text = re.split(r"\s*(?:Argument helptext:|For full helptext)", text)[0]

    # Errors whose values are known.
    if choice := re.fullmatch(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\.?", text):
        choices = sorted(set(re.findall(r"'([^']*)'", choice[3])) - {"None"}, key=choice[3].index)
        place = choice[2] if choice[2].startswith("-") else choice[2].upper()
        return f"{place} must be one of {', '.join(choices)}, got {choice[1]!r}{nearest(choice[1], choices)}"
    if rest := re.fullmatch(r"Unrecognized options: (.*)", text):
        unknown = next((word for word in words if rest[1].startswith(" ".join(word.split()))), rest[1])
        return f"unexpected argument {_shown(unknown)}"

    # Others, reworded if their wording is known.
    for pattern, replacement in _ERRORS:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"\.? \(required\) ", "; ", text)


def _subject(name: str) -> str:
    """The command that a message is about, without the program's name, which every message begins with."""
    _, _, command = name.removeprefix("python -m ").partition(" ")
    return f"{command}: " if command else ""


def _shown(word: str) -> str:
    return word if word.isprintable() and " " not in word else repr(word)


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
