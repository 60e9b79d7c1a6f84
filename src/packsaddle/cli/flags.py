"""The flags of a command: its parameters, with each option class (a dataclass of settings) expanded into its fields."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

from packsaddle.errors import config_errors
from packsaddle.options.describe import option_class
from packsaddle.options.schema import is_required, settable

Command = Callable[..., Any]  # a function, or a class with callable instances
T = TypeVar("T")
C = TypeVar("C", bound=Command)


def grouped(groups: Mapping[str, str]) -> Callable[[C], C]:
    """Return a decorator that sets how the help of a command groups its flags, and in which order it shows them.
    `groups` maps each group's title to the names of its flags, separated by spaces. The group with the title "" comes
    first, and is shown without a title."""

    def decorate(command: C) -> C:
        vars(command)["groups"] = groups
        return command

    return decorate


def groups_of(command: Command) -> dict[str, list[str]]:
    """Return the names of a command's flags in a dict by the title of their group. Flags without a group are
    omitted."""
    return {title: names.split() for title, names in vars(command).get("groups", {}).items()}


@dataclass(frozen=True)
class Overrides(Generic[T]):
    """The values of the fields of an option class T (a dataclass of settings) that are set on the command line. Fields
    that are not set are omitted."""

    values: Mapping[str, Any] = field(default_factory=dict)


def flags_of(command: Command) -> dict[str, inspect.Parameter]:
    """Return a command's flags by name. They are its parameters, but a parameter whose type is an option class, i.e. a
    dataclass of settings, is replaced by the settable fields of that class.

    Annotations that are strings are evaluated. Flags without a group come first, then the flags of each group in the
    order of the groups. The default of a field is its value in the parameter's default. If the parameter has no
    default, the field keeps the default of its class. If the parameter's type is `Overrides`, the default of each field
    is None.
    """
    found: dict[str, inspect.Parameter] = {}
    hints = get_type_hints(command, include_extras=True)
    for name, parameter in inspect.signature(command).parameters.items():
        cls = option_class(hints[name])
        if cls is None:
            found[name] = parameter.replace(annotation=hints[name])
            continue
        for f in settable(cls):
            hint = get_type_hints(cls, include_extras=True)[f.name]
            default = getattr(parameter.default, f.name, parameter.empty if is_required(f) else f.default)
            if get_origin(hints[name]) is Overrides:
                hint, default = hint | None, None
            found[f.name] = parameter.replace(name=f.name, annotation=hint, default=default)
    listed = [name for names in groups_of(command).values() for name in names]
    return {name: found[name] for name in [*(n for n in found if n not in listed), *listed]}


def arguments_of(command: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """Convert `values`, the values of a command's flags by name, to the keyword arguments of the command.

    An argument is either the value of one flag, or an object of an option class (a dataclass of settings) that is made
    from the values of several flags. Raises ConfigError, naming the flag, if a value is out of range.
    """
    arguments = dict(values)
    for name, hint in get_type_hints(command).items():
        cls = option_class(hint)
        if cls is None:
            continue
        options = {f.name: arguments.pop(f.name) for f in settable(cls)}
        is_partial = get_origin(hint) is Overrides
        options = {key: value for key, value in options.items() if value is not None or not is_partial}
        with config_errors("--"):
            made = cls(**options)
        arguments[name] = Overrides(options) if is_partial else made
    return arguments
