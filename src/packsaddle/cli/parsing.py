"""From the words of a command line to a call; every mistake is one line that names the nearest valid word.

tyro parses a command's flags by its signature and writes its help. Its errors are boxes of many lines. The events
behind them, which say more, are not public, so that another version may lack them: then the box's text is the line.
The script that completes commands and flags in a shell is tyro's, too.
"""

import functools
import inspect
import io
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_origin, get_type_hints

import tyro
from tyro.extras import SubcommandApp

from packsaddle.errors import ConfigError
from packsaddle.experiments.numerals import real, seconds, whole
from packsaddle.experiments.schema import nearest

# Numbers may be written 1e6, 25M or 1%.
NUMBERS = tyro.constructors.ConstructorRegistry()


@NUMBERS.primitive_rule
def _numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    if info.type not in (int, float):
        return None
    read: Callable[[str], Any] = whole if info.type is int else real
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT" if info.type is int else "FLOAT",
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, info.type),
        str_from_instance=lambda value: [str(value)],
    )


# A float parameter in seconds, which may be written with a unit.
Seconds = Annotated[
    float,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="SECONDS",
        instance_from_str=lambda words: seconds(words[0]),
        is_instance=lambda value: isinstance(value, float),
        str_from_instance=lambda value: [str(value)],
    ),
]

Command = Callable[..., Any]  # a function, or a class whose instances are called

MARKERS = (
    tyro.conf.DisallowNone,  # what may be left out is left out, not given as None
    tyro.conf.FlagCreatePairsOff,  # --serial, without --no-serial
    tyro.conf.PositionalMetavarFromFieldName,
)
UNSAID = tyro.conf.arg(help_behavior_hint="")  # for a default that the help says in words
_KINDS = {
    "INT|{all}": "a whole number or all",
    "INT": "a whole number",
    "FLOAT": "a number",
    "SECONDS": "seconds such as 30, 55ms or 2min",
    "PATH": "a path",
    "STR": "a text",
}


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


def parse(group: Group, words: Sequence[str], name: str) -> Callable[[], Any]:
    """Return the call that the words after the group's name ask for.

    Raises ConfigError if they cannot be understood, and SystemExit when the help that they ask for has been printed.
    """
    if not words or words[0] in ("-h", "--help"):
        return functools.partial(print, group.overview(name))
    word, *rest = words
    if word not in group.commands:
        if word.startswith("-"):
            hint = nearest(word, ["--help", "--version"]) or " (flags come after a command)"
            raise ConfigError(f"{_subject(name)}unknown flag {_shown(word)}{hint}")
        hint = nearest(word, group.commands) or f" (there is {', '.join(group.commands)})"
        raise ConfigError(f"{_subject(name)}unknown command {_shown(word)}{hint}")
    command = group.commands[word]
    if isinstance(command, Group):
        return parse(command, rest, f"{name} {word}")
    return _parse_flags(command, rest, f"{name} {word}")


def _parse_flags(command: Command, words: Sequence[str], name: str) -> Callable[[], Any]:
    words, said = _joined(command, words), io.StringIO()
    try:
        with redirect_stderr(said), _one_line_errors(command, words, name):
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
        raise ConfigError(f"{_subject(name)}{_without_box(said.getvalue())}") from None


def _joined(command: Command, words: Sequence[str]) -> list[str]:
    """Put together what a flag of several values is given in several places, of which tyro would take the last."""
    tuples = [name for name, hint in get_type_hints(command).items() if get_origin(hint) is tuple]
    several = {f"--{name.replace('_', '-')}" for name in tuples}
    values: dict[str, list[str]] = {}
    others: list[str] = []
    place, repeated = others, False
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
    """Return a function of the same signature that returns the call to be made, as a class does by itself.

    Where the default is nothing, or off, its help does not repeat it.
    """
    if inspect.isclass(command):
        return command
    hints, signature = get_type_hints(command, include_extras=True), inspect.signature(command)
    for name, parameter in signature.parameters.items():
        if parameter.default is None or isinstance(parameter.default, bool) or parameter.default == ():
            hints[name] = Annotated[hints[name], UNSAID]

    def later(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return functools.partial(command, *args, **kwargs)

    later.__doc__ = re.sub(r"\n {8}(?=\S)", " ", inspect.getdoc(command) or "")  # an argument's lines, joined
    later.__name__, later.__annotations__ = command.__name__, hints
    parameters = [p.replace(annotation=hints[name]) for name, p in signature.parameters.items()]
    later.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return later


@contextmanager
def _one_line_errors(command: Command, words: Sequence[str], name: str) -> Iterator[None]:
    """Raise ConfigError where tyro would print an error that it has an event for.

    An unknown flag comes first: tyro may rather miss what that stands in the place of.
    """
    try:
        from tyro import _errors
    except ImportError:
        yield
        return

    known = {*_flags(command), "--help", "--"}
    unknown = [w for w in words if w.startswith("--") and w.partition("=")[0].replace("_", "-") not in known]

    def refuse(event: Any) -> None:
        if unknown:
            raise ConfigError(_subject(name) + _unrecognized(unknown[0], command))
        explain = _EXPLANATIONS.get(type(event).__name__)
        if explain is not None:
            with suppress(AttributeError):  # where another version of tyro has other events, its own text will do
                raise ConfigError(_subject(name) + explain(event, command))

    with _errors.on_parse_error(refuse):
        yield


def _unrecognized(word: str, command: Command) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {_shown(word)}"
    flag, flags = word.partition("=")[0], _flags(command)
    other = " (keys of the configuration go through --set key=value)" if "--set" in flags else " (see --help)"
    return f"unknown flag {_shown(flag)}{nearest(flag, flags) or other}"


def _flags(command: Command) -> list[str]:
    """Its own flags; those that are on by themselves are turned off by --no-NAME."""
    parameters = inspect.signature(command).parameters.values()
    positional = [p for p in parameters if tyro.conf.Positional in getattr(p.annotation, "__metadata__", ())]
    names = [f"{'no-' * (p.default is True)}{p.name}" for p in parameters if p not in positional]
    return [f"--{name.replace('_', '-')}" for name in names]


def _missing(event: Any, command: Command) -> str:
    return "missing " + ", ".join(f"{_name(a.arg)}: {a.arg.field.helptext}" for a in event.missing_arguments)


def _choice(event: Any, command: Command) -> str:
    choices, value = list(event.choices), event.value
    if "None" in choices:  # of a flag that may be left out, whose choices tyro has in no order
        choices = sorted({*choices} - {"None"})
    return f"{_name(event.argument)} must be one of {', '.join(choices)}, got {value!r}{nearest(value, choices)}"


def _refused_value(event: Any, command: Command) -> str:
    if event.argument is None:
        return str(event.message)
    found = event.message.rpartition(": ")[2]
    listed = re.fullmatch(r"\[(.*)\] does not match choices .*", found)  # of a number or a word
    return f"{_name(event.argument)} must be {_kind(event.argument)}, got {listed[1] if listed else found}"


def _kind(argument: Any) -> str:
    metavar = str(argument.lowered.metavar)
    return _KINDS.get(metavar, metavar)


def _name(argument: Any) -> str:
    """A flag as it is typed, or the placeholder of a positional argument."""
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[-1])


_EXPLANATIONS: dict[str, Callable[[Any, Command], str]] = {
    "UnrecognizedArgs": lambda event, command: _unrecognized(event.tokens[0], command),
    "MissingArgs": _missing,
    "BadValue": lambda event, command: f"{_name(event.argument)} needs {_kind(event.argument)} after it",
    "InvalidChoice": _choice,
    "InstantiationFailure": _refused_value,
}


def _without_box(text: str) -> str:
    return " ".join(re.sub(r"[─│╭╮╰╯|+]|-{3,}", " ", text).split())


def _subject(name: str) -> str:
    """The command that a message is about, without the program's name, which every message begins with."""
    return f"{name.partition(' ')[2]}: " if " " in name else ""


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
