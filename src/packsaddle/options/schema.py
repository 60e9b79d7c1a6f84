"""Construction of frozen dataclasses from plain data, such as a saved state. Error messages name the invalid key by its
path, and the most similar valid key."""

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from packsaddle.errors import ConfigError
from packsaddle.messages import shortened, shown

T = TypeVar("T")
Place = tuple[str | int, ...]  # path to a value: keys of tables and indices of lists, the outermost first


def build(cls: type[T], data: Mapping[str, Any], where: Place = ()) -> T:
    """Construct the dataclass `cls` from `data`: return cls(**data). Every key and value is first checked against the
    annotations of the dataclass. Raises ConfigError if a key is unknown or missing, or if a value is invalid.

    `where` is the path of `data` in the whole document, for error messages.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{dotted(where) or 'the document'} must be a table, got {shown(data)}")
    hints, names = get_type_hints(cls), [f.name for f in settable(cls)]
    for key in data:
        if key not in names:
            raise ConfigError(f"unknown key {dotted((*where, key))}{nearest(key, names)}")
    for name in names:
        if name not in data:
            raise ConfigError(f"missing key {dotted((*where, name))}")
    values = {key: decode(hints[key], value, (*where, key)) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{dotted(where)}: {error}" if where else str(error)) from error


def settable(cls: Any) -> list[dataclasses.Field[Any]]:
    found = [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]
    return sorted(found, key=lambda f: not is_required(f))


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def decode(hint: Any, value: Any, where: Place = ()) -> Any:
    """Convert plain data to the type `hint`. Dataclasses are constructed by `build`. Raises ConfigError if the data do
    not fit the type.

    Args:
        hint: A type annotation.
        value: The data: a plain value, or nested dictionaries and lists.
        where: The path of `value` in the whole document, for error messages.
    """
    # Decode annotations that allow several types or values.
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and type(None) in args):
        return value
    if origin in (Union, types.UnionType):  # the annotation is X | None
        (inner,) = (a for a in args if a is not type(None))
        return decode(inner, value, where)
    if origin is Literal:
        if value not in args:
            near = nearest(value, args)
            raise ConfigError(f"{dotted(where)} must be one of {_listed(args)}, got {shown(value)}{near}")
        return value

    # Decode dictionaries, lists and dataclasses.
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{dotted(where)} must be a table, got {shown(value)}")
        return {key: decode(args[1], inner, (*where, key)) for key, inner in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{dotted(where)} must be a list, got {shown(value)}")
        each = args if origin is tuple and args[1:] != (...,) else args[:1] * len(value)
        if len(each) != len(value):
            raise ConfigError(f"{dotted(where)} must have {len(each)} entries, got {len(value)}")
        return origin(decode(a, v, (*where, i)) for i, (a, v) in enumerate(zip(each, value, strict=True)))
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]

    # Decode plain types. A bool does not count as a number.
    if not isinstance(value, (float, int) if hint is float else hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{dotted(where)} must be of type {hint.__name__}, got {shown(value)}")
    return value


def nearest(word: Any, candidates: Any) -> str:
    """Return " (did you mean X?)", where X is the candidate whose spelling is closest to `word`. Returns "" if no
    candidate has a similar spelling."""
    match = difflib.get_close_matches(shortened(str(word)), [str(c) for c in candidates], n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(repr, values))


def dotted(where: Place) -> str:
    """Return a path of keys as one line of text, such as a.b.c or a[0].b."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in where)
    return shortened("".join(parts).removeprefix("."))
