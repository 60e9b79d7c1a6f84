"""The flags of a command: its arguments, and the fields of an option class among them."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar, get_origin, get_type_hints

from packsaddle.errors import config_errors
from packsaddle.options.describe import option_class
from packsaddle.options.schema import is_required, settable

Command = Callable[..., Any]  # a function, or a class whose instances are called
T = TypeVar("T")


@dataclass(frozen=True)
class Given(Generic[T]):
    """The options of a class T that a command line gives; the others have no defaults of their own."""

    values: Mapping[str, Any] = field(default_factory=dict)

    def over(self, base: T) -> T:
        """Return `base` with the given options in place of its own."""
        return replace(base, **self.values)  # type: ignore[type-var]


def flags_of(command: Command) -> dict[str, inspect.Parameter]:
    """Return a command's parameters with evaluated annotations, an option class replaced by its settable fields.

    Defaults are those of the argument's own default, else of the class; None for fields of a `Given`.
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
            if get_origin(hints[name]) is Given:
                hint, default = hint | None, None
            found[f.name] = parameter.replace(name=f.name, annotation=hint, default=default)
    return found


def arguments_of(command: Command, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a command's arguments from the values of its flags, those of an option class as one argument.

    Raises ConfigError, which names the flag, for a value outside its range.
    """
    arguments = dict(values)
    for name, hint in get_type_hints(command).items():
        cls = option_class(hint)
        if cls is None:
            continue
        options = {f.name: arguments.pop(f.name) for f in settable(cls)}
        is_partial = get_origin(hint) is Given
        options = {key: value for key, value in options.items() if value is not None or not is_partial}
        with config_errors("--"):
            made = cls(**options)
        arguments[name] = Given(options) if is_partial else made
    return arguments
