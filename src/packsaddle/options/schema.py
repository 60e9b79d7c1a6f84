"""Construction of frozen dataclasses from dictionaries, such as those read from TOML. Error messages name the invalid
key, and the most similar valid key of its table."""

import dataclasses
import difflib
import math
import types
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from packsaddle.errors import ConfigError
from packsaddle.messages import shortened, shown
from packsaddle.options.numerals import real, whole

T = TypeVar("T")
Place = tuple[str | int, ...]  # path to a value: keys of tables and indices of lists, the outermost first


def build(cls: type[T], data: Mapping[str, Any], where: Place = (), *, saved: bool = False) -> T:
    """Construct the dataclass `cls` from `data`: return cls(**data). Every key and value is first checked against the
    annotations of the dataclass. Raises ConfigError if a key is unknown or missing, or if a value is invalid.

    Args:
        cls: The dataclass. A field whose type is a union of dataclasses needs a table with the key `kind`, the name of
            one of them.
        data: The values of the fields, by name.
        where: The path of `data` in the whole configuration, for error messages.
        saved: True for data that `feedback.state` wrote. Fields with defaults must then be present, and numbers must
            not be text.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{dotted(where) or 'a configuration'} must be a table, got {shown(data)}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in settable(cls)}

    # Report unknown keys before checking any value.
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key {dotted((*where, key))}{nearest(key, fields)}")
    values = {}
    for key, value in data.items():
        # If the field is a fraction, do not convert an integer to float, so that the class can reject the integer 1,
        # which may be meant as a count or as 1%.
        is_kept = fields[key].metadata.get("share") and isinstance(value, int) and not isinstance(value, bool)
        values[key] = value if is_kept else decode(hints[key], value, (*where, key), saved=saved)
    for name, f in fields.items():
        if (saved or is_required(f)) and name not in values:
            allowed = f", one of {_listed(get_args(hints[name]))}" if get_origin(hints[name]) is Literal else ""
            raise ConfigError(f"missing key {dotted((*where, name))}{allowed}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{dotted(where)}: {error}" if where else str(error)) from error


def settable(cls: Any) -> list[dataclasses.Field[Any]]:
    found = [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]
    return sorted(found, key=lambda f: not is_required(f))


def is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def plain(value: Any) -> Any:
    """Convert a dataclass to dictionaries and lists, from which `build` can construct it again. A dataclass in a field
    whose type is a union of dataclasses gets the key `kind`, the name of its class.

    If `value` is not a dataclass, it is returned unchanged, except that a tuple becomes a list and a non-finite float
    becomes text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints, found = get_type_hints(type(value)), {}
        for f in settable(type(value)):
            inner = getattr(value, f.name)
            tag = {"kind": type(inner).__name__} if type(inner) in choices(hints[f.name]) else None
            found[f.name] = plain(inner) if tag is None else tag | plain(inner)
        return found
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no infinity; `build` reads "inf"
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def choices(hint: Any) -> tuple[Any, ...]:
    """Return the dataclasses in `hint` if it is a union of at least two dataclasses. Otherwise return (). `hint` is a
    type annotation."""
    alternatives = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    classes = tuple(m for m in alternatives if dataclasses.is_dataclass(m))
    return classes if len(classes) > 1 else ()


def decode(hint: Any, value: Any, where: Place = (), *, saved: bool = False) -> Any:
    """Convert plain data to the type `hint`. Dataclasses are constructed by `build`. Raises ConfigError if the data do
    not fit the type.

    Args:
        hint: A type annotation.
        value: The data: a plain value, or nested dictionaries and lists.
        where: The path of `value` in the whole configuration, for error messages.
        saved: False for a configuration. Then a number may be text such as "25M", a plain value may be given in place
            of a table to set the table's first field, and fields with defaults may be missing. True for data that
            `feedback.state` wrote, in which each of these three is an error.
    """
    # Decode annotations that allow several types or values.
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any or (value is None and type(None) in args):
        return value
    if kinds := choices(hint):
        by_name = {c.__name__: c for c in kinds}
        names = ", ".join(by_name)
        if not isinstance(value, Mapping) or "kind" not in value:
            raise ConfigError(f"{dotted(where)} must be a table with a kind, one of {names}; got {shown(value)}")
        kind, place = value["kind"], (*where, "kind")
        if not isinstance(kind, str) or kind not in by_name:
            near = nearest(kind, by_name)
            raise ConfigError(f"{dotted(place)} must be one of {names}, got {shown(kind)}{near}")
        return build(by_name[kind], {k: v for k, v in value.items() if k != "kind"}, where, saved=saved)
    if origin in (Union, types.UnionType):  # the annotation is X | None
        (inner,) = (a for a in args if a is not type(None))
        return decode(inner, value, where, saved=saved)
    if origin is Literal:
        if value not in args:
            near = nearest(value, args)
            raise ConfigError(f"{dotted(where)} must be one of {_listed(args)}, got {shown(value)}{near}")
        return value

    # Decode dictionaries, lists and dataclasses.
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{dotted(where)} must be a table, got {shown(value)}")
        return {key: decode(args[1], inner, (*where, key), saved=saved) for key, inner in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{dotted(where)} must be a list, got {shown(value)}")
        each = args if origin is tuple and args[1:] != (...,) else args[:1] * len(value)
        if len(each) != len(value):
            raise ConfigError(f"{dotted(where)} must have {len(each)} entries, got {len(value)}")
        pairs = enumerate(zip(each, value, strict=True))
        return origin(decode(a, v, (*where, i), saved=saved) for i, (a, v) in pairs)
    if dataclasses.is_dataclass(hint):
        first = settable(hint)[:1]
        if not (saved or isinstance(value, Mapping)) and first and first[0].default is not dataclasses.MISSING:
            value = {first[0].name: value}
        return build(hint, value, where, saved=saved)  # type: ignore[arg-type]

    # Decode plain types. A bool does not count as a number.
    if not saved and hint in (int, float) and not isinstance(value, bool):
        value = _number(hint, value)
    if not isinstance(value, (float, int) if hint is float else hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{dotted(where)} must be of type {hint.__name__}, got {shown(value)}")
    return value


def _number(hint: type, value: Any) -> Any:
    """Convert a text such as "25M", "1%" or "1e3" to a number of type `hint`, int or float. A float that is a whole
    number is converted to int, and an int to float, if `hint` requires it. Any other `value` is returned unchanged."""
    if isinstance(value, str):
        with suppress(ValueError):
            return whole(value) if hint is int else real(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return whole(repr(value))
    return float(value) if hint is float and isinstance(value, int) else value


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
