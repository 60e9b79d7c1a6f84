"""Parse a command line into a function call. Every error message is one line; for an unknown word it names the most
similar valid word.

The parameters of a command's function are its flags. Positional-only parameters are positional arguments.
"""

import argparse
import functools
import inspect
import shutil
import textwrap
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin

from packsaddle.cli.commands import asked_for_help, overview
from packsaddle.cli.flags import Command, arguments_of, flags_of, groups_of
from packsaddle.errors import ConfigError
from packsaddle.options.describe import descriptions
from packsaddle.options.numerals import DURATION, real, seconds, whole
from packsaddle.options.schema import nearest

# Type of a parameter in seconds, which may be written with a unit, such as 90s.
Seconds = Annotated[float, "seconds"]

# For each type of a number: its name in help, the function that parses it, and its description in error messages.
_NUMBERS: Mapping[Any, tuple[str, Callable[[str], Any], str]] = {
    int: ("INT", whole, "a whole number"),
    float: ("FLOAT", real, "a number"),
    Seconds: ("SECONDS", seconds, DURATION),
}


@dataclass(frozen=True)
class Group:
    """A group of commands: its description `about`, and its commands or subgroups by name."""

    about: str
    commands: Mapping[str, "Command | Group"]


class ImportedCommands(UserDict[str, Any]):
    """The commands in a table such as `commands.COMMANDS`, by name. Looking up a command
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


class _Parser(argparse.ArgumentParser):
    """A parser that raises a ConfigError, instead of printing an error and exiting."""

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        raise ConfigError(f"{_subject(self.prog)}{message}")


def _parse_flags(command: Command, words: Sequence[str], name: str) -> Callable[[], Any]:
    flags = flags_of(command)
    given, rest = _parser(command, flags, name).parse_known_intermixed_args(words)

    # Report unknown words before missing ones.
    for word in rest:
        if word.startswith("-"):
            unknown, known = word.partition("=")[0], map(word_of, flags.values())
            hint = nearest(unknown, known) or " (see --help)"
            raise ConfigError(f"{_subject(name)}unknown flag {_shown(unknown)}{hint}")
    if rest:
        raise ConfigError(f"{_subject(name)}unexpected argument {_shown(rest[0])}")
    values = {key: flag.default for key, flag in flags.items() if flag.default is not flag.empty}
    for key, value in vars(given).items():
        if value not in (None, []):  # argparse's values for a flag that is not given
            values[key] = tuple(value) if isinstance(value, list) else value
    if missing := ", ".join(word_of(flag) for key, flag in flags.items() if key not in values):
        raise ConfigError(f"{_subject(name)}missing {missing}")

    arguments = arguments_of(command, values)
    positional = [arguments.pop(key) for key, flag in flags.items() if _is_positional(flag)]
    call = functools.partial(command, *positional, **arguments)
    return call() if inspect.isclass(command) else call  # the instances of a class are callable


def word_of(flag: inspect.Parameter) -> str:
    """Return a flag as it is written on the command line, such as --max-hvps, or a positional argument in capitals."""
    return flag.name.upper() if _is_positional(flag) else f"--{flag.name.replace('_', '-')}"


def _is_positional(flag: inspect.Parameter) -> bool:
    return flag.kind is flag.POSITIONAL_ONLY


def _parser(command: Command, flags: Mapping[str, inspect.Parameter], name: str) -> argparse.ArgumentParser:
    # The help is the docstring before "Args:". Wrap its paragraphs here, except for examples.
    first, *others = (inspect.getdoc(command) or "").partition("\n\nArgs:")[0].split("\n\n")
    width = shutil.get_terminal_size().columns
    wrapped = (p if p.startswith("Examples:") else textwrap.fill(p, width) for p in others)
    positional = [word_of(flag) for flag in flags.values() if _is_positional(flag)]
    parser = _Parser(
        prog=name,
        usage=" ".join([name, *positional, "[options]"]),
        description="\n\n".join([first, *wrapped]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    # Add each flag to its group. Flags without a group are in argparse's own group "options".
    texts, places = descriptions(command), dict[str, Any]()
    for title, keys in groups_of(command).items():
        places |= dict.fromkeys(keys, parser.add_argument_group(f"{title} options") if title else parser)
    for key, flag in flags.items():
        word = key if _is_positional(flag) else word_of(flag)
        places.get(key, parser).add_argument(word, **_options(flag, texts.get(key, "")))
    return parser


def _options(flag: inspect.Parameter, text: str) -> dict[str, Any]:
    """Return the arguments of argparse's `add_argument` for a flag with the description `text`. The help does not show
    the defaults None and (), nor those of switches."""
    hint = flag.annotation
    if hint is not bool and flag.default not in (None, (), flag.empty):
        text += f" (default: {flag.default})"
    options: dict[str, Any] = {"help": text.replace("%", "%%")}
    if hint is bool:
        return {**options, "action": "store_true"}
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
        options |= {"nargs": "*", "action": "extend"}
    elif _is_positional(flag):
        options["nargs"] = "?"  # a missing one is reported by `_parse_flags`
    if _is_positional(flag) and get_origin(hint) is Literal:
        options["help"] += f" One of {', '.join(get_args(hint))}."
    metavar = word_of(flag) if _is_positional(flag) else "|".join(map(_metavar, _kinds(hint)))
    return {**options, "metavar": metavar, "type": functools.partial(_read, hint)}


def _kinds(hint: Any) -> list[Any]:
    """Return the types that a value may have: the members of a union without None, or `hint` itself."""
    if get_origin(hint) in (Annotated, Literal) or not get_args(hint):
        return [hint]
    return [kind for kind in get_args(hint) if kind is not type(None)]


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return _NUMBERS[kind][0] if kind in _NUMBERS else {"str": "TEXT"}.get(kind.__name__, kind.__name__.upper())


def _read(hint: Any, word: str) -> Any:
    """Convert a word of the command line to the type `hint`. Raises argparse.ArgumentTypeError if it is no such
    value."""
    expected, near = [], ""
    for kind in _kinds(hint):
        if get_origin(kind) is Literal:
            words = get_args(kind)
            if word in words:
                return word
            expected.append(f"{'one of ' * (len(words) > 1)}{', '.join(words)}")
            near = nearest(word, words)
        elif kind in _NUMBERS:
            _, parsed, text = _NUMBERS[kind]
            try:
                return parsed(word)
            except ValueError:
                expected.append(text)
        else:
            return kind(word)
    raise argparse.ArgumentTypeError(f"must be {' or '.join(expected)}, got {word!r}{near}")


def _subject(name: str) -> str:
    _, _, command = name.removeprefix("python -m ").partition(" ")
    return f"{command}: " if command else ""


def _shown(word: str) -> str:
    return word if word.isprintable() and " " not in word else repr(word)
