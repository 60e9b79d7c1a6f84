"""Parse a command line into a function call. Every error message is one line; for an unknown word it names the most
similar valid word.

The library tyro parses a command's flags by its signature, and writes help. Its errors are boxes of several lines.
`_one_line` joins these lines and, if it recognizes the error, rewords it.
"""

import functools
import inspect
import io
import os
import re
import shutil
import textwrap
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from typing import Annotated, Any, get_origin

import tyro

from packsaddle.cli.flags import Command, arguments_of, flags_of, groups_of
from packsaddle.errors import ConfigError
from packsaddle.options.describe import descriptions
from packsaddle.options.numerals import DURATION, real, seconds, whole
from packsaddle.options.schema import nearest
from packsaddle_command import asked_for_help, overview

# Parsers for numbers on the command line, which may be written 1e6, 25M or 1%.
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


# Type of a parameter in seconds, which may be written with a unit, such as 90s.
Seconds = Annotated[float, _number(float, seconds, "SECONDS", DURATION)]

MARKERS = (
    tyro.conf.DisallowNone,  # None is not accepted as a value of optional flags
    tyro.conf.FlagCreatePairsOff,  # a flag --serial gets no counterpart --no-serial
    tyro.conf.PositionalMetavarFromFieldName,
)
HIDE_DEFAULT = tyro.conf.arg(help_behavior_hint="")  # marks a parameter whose help text describes the default


@dataclass(frozen=True)
class Group:
    """A group of commands: its description `about`, and its commands or subgroups by name."""

    about: str
    commands: Mapping[str, "Command | Group"]


class ImportedCommands(UserDict[str, Any]):
    """The commands in the table of the console script (`packsaddle_command.COMMANDS`), by name. Looking up a command
    imports its module."""

    def __getitem__(self, word: str) -> "Command | Group":
        about, target = super().__getitem__(word)
        if not isinstance(target, str):
            return Group(about, ImportedCommands(target))
        command: Command = getattr(import_module(target), word.replace("-", "_"))
        return command


def summary(command: Command | Group) -> str:
    return (command.about if isinstance(command, Group) else inspect.getdoc(command) or "").partition("\n")[0]


def parse(group: Command | Group, words: Sequence[str], name: str) -> Callable[[], Any]:
    """Parse `words`, the words of the command line after the program's name `name`. Returns a function without
    arguments, which runs the command named by `words`; this command is in `group` or is `group` itself. Raises
    ConfigError if the words are invalid, and SystemExit after printing the help of a command."""
    if not isinstance(group, Group):
        return _parse_flags(group, words, name)
    words = asked_for_help(words)
    if not words or words[0] in ("-h", "--help"):
        summaries = {word: summary(command) for word, command in group.commands.items()}
        return functools.partial(print, overview(group.about, summaries, name))
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
    words, errors = _joined(command, words), io.StringIO()
    if not {"-h", "--help"} & {*words}:
        # Report an unknown flag here. Otherwise tyro would report the positional argument that the unknown flag
        # displaces.
        parameters = flags_of(command).values()
        positional = [p for p in parameters if tyro.conf.Positional in getattr(p.annotation, "__metadata__", ())]
        names = [f"{'no-' * (p.default is True)}{p.name}" for p in parameters if p not in positional]
        flags = [f"--{name.replace('_', '-')}" for name in names]
        for word in words:
            flag = word.partition("=")[0]
            if word.startswith("--") and flag.replace("_", "-") not in {*flags, "--"}:
                other = " (set keys of the configuration by --set key=value)" if "--set" in flags else " (see --help)"
                raise ConfigError(f"{_subject(name)}unknown flag {_shown(flag)}{nearest(flag, flags) or other}")

    # The help is the docstring before "Args:". Wrap its paragraphs here, since tyro joins the lines of a
    # paragraph (if they begin with a letter) but does not wrap the result.
    first, *others = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0].split("\n\n")
    width = shutil.get_terminal_size().columns
    wrapped = (p if p.startswith("Examples:") else textwrap.fill(p, width, subsequent_indent=" ") for p in others)
    description = "\n\n".join([first, *wrapped])

    # Since tyro prints an error and exits, convert the printed text to a ConfigError of one line.
    try:
        with redirect_stderr(errors), _unwrapped(words):
            options: dict[str, Any] = {"args": words, "config": MARKERS, "registry": NUMBERS}
            call: Callable[[], Any] = tyro.cli(deferred(command), prog=name, description=description, **options)
            return call
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(f"{_subject(name)}{_one_line(errors.getvalue(), words)}") from None


def _joined(command: Command, words: Sequence[str]) -> list[str]:
    """Merge repetitions of each flag that accepts several values, and move the merged flag to the end of the command
    line. Otherwise the parser tyro would use only the last repetition."""
    tuples = [name for name, flag in flags_of(command).items() if get_origin(flag.annotation) is tuple]
    several = {f"--{name.replace('_', '-')}" for name in tuples}
    values: dict[str, list[str]] = {}
    others: list[str] = []
    place, repeated = others, False

    # Assign each value to the last flag before it.
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


def deferred(command: Command) -> Command:
    """Wrap `command` for tyro, the library that parses flags, as a function that returns a deferred call of
    `command`. The function has one parameter for each flag without a group, and one for each group of flags. The
    help does not show the defaults None, True, False and (). If `command` is a class, it is returned unchanged."""
    if inspect.isclass(command):
        return command
    flags, texts = flags_of(command), descriptions(command)
    for name, flag in flags.items():
        hidden = flag.default is None or isinstance(flag.default, bool) or flag.default == ()
        about = tyro.conf.arg(help=texts.get(name), prefix_name=False, help_behavior_hint="" if hidden else None)
        flags[name] = flag.replace(annotation=Annotated[flag.annotation, about], kind=flag.KEYWORD_ONLY)

    # Put each group of flags into a dataclass: tyro shows its fields in a box, titled by the parameter's name.
    boxes = {title: names for title, names in groups_of(command).items() if title}
    for title, names in boxes.items():
        fields = [(name, flags[name].annotation, field(default=flags.pop(name).default)) for name in names]
        box = make_dataclass("Box", fields, namespace={"__doc__": ""})
        flags[title] = inspect.Parameter(
            title.replace(" ", "_"),
            inspect.Parameter.KEYWORD_ONLY,
            annotation=Annotated[box, tyro.conf.arg(name=title)],
        )

    def later(**values: Any) -> Callable[[], Any]:
        for title in boxes:
            values |= vars(values.pop(title.replace(" ", "_")))
        return functools.partial(command, **arguments_of(command, values))

    # Set the docstring, name, annotations and signature, which tyro reads.
    later.__doc__ = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0]
    later.__name__, later.__annotations__ = command.__name__, {f.name: f.annotation for f in flags.values()}
    later.__signature__ = inspect.Signature(list(flags.values()))  # type: ignore[attr-defined]
    return later


@contextmanager
def _unwrapped(words: Sequence[str]) -> Iterator[None]:
    """Context manager that sets the terminal width, COLUMNS, so large that the parser tyro does not wrap its error
    messages. No-op if the command line `words` contains -h or --help."""
    before = os.environ.get("COLUMNS")
    if not {"-h", "--help"} & {*words}:
        os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        os.environ.pop("COLUMNS", None)
        if before is not None:
            os.environ["COLUMNS"] = before


# Patterns of tyro's error messages, with replacements. Messages that match none, such as those of a later version of
# tyro, stay unchanged.
_ERRORS = (
    (r"Error parsing (\S+): (?:.*(?:'>|\)\]): )?(must be .*)", r"\1 \2"),
    (r"Missing value for argument '(\S+)'.*", r"\1 needs a value after it"),
    (r"Missing from [^:]*: (.*) \(required\)", r"missing \1"),
    # This pattern is for a flag that accepts a number or one word.
    (r"(must be [^']*?), (got '.*') - typing\.Literal\['(\w+)'\]:.*", r"\1 or \3, \2"),
)


def _one_line(text: str, words: Sequence[str]) -> str:
    """Convert `text`, an error message of several lines that the parser tyro printed for the command line `words`, to
    one line. The box around the message, its title and the hints at its end are removed, and known errors are
    reworded."""
    lines = [line.strip(" │|") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match(r"[─╭╰]|\+-|----", line)]
    # Skip the title of the box, which is in or above the first rule (a line of box characters).
    first = rules[0] + 1 if rules else 0
    text = " ".join(line for i, line in enumerate(lines) if line and i >= first and i not in rules)
    text = re.split(r"\s*(?:Argument helptext:|For full helptext)", text)[0]

    # Reword errors on invalid choices and unexpected arguments.
    if choice := re.fullmatch(r"invalid choice '(.*)' for argument '(\S+)'\. Expected one of \((.*)\)\.?", text):
        choices = sorted(set(re.findall(r"'([^']*)'", choice[3])) - {"None"}, key=choice[3].index)
        place = choice[2] if choice[2].startswith("-") else choice[2].upper()
        return f"{place} must be one of {', '.join(choices)}, got {choice[1]!r}{nearest(choice[1], choices)}"
    if rest := re.fullmatch(r"Unrecognized options: (.*)", text):
        unknown = next((word for word in words if rest[1].startswith(" ".join(word.split()))), rest[1])
        return f"unexpected argument {_shown(unknown)}"

    # Reword all other errors by the patterns in _ERRORS.
    for pattern, replacement in _ERRORS:
        text = re.sub(pattern, replacement, text)
    return re.sub(r"\.? \(required\) ", "; ", text)


def _subject(name: str) -> str:
    _, _, command = name.removeprefix("python -m ").partition(" ")
    return f"{command}: " if command else ""


def _shown(word: str) -> str:
    return word if word.isprintable() and " " not in word else repr(word)
