"""Frozen dataclasses from plain dictionaries (TOML), with errors that name the key and the nearest valid one."""

import dataclasses
import difflib
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message is one line."""


def build(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Return cls(**data), checking every key and value against the dataclass's annotations.

    `where` is the dotted path of `data`, for messages. A field whose type is a union of dataclasses takes a
    table with a `kind`, the class's name. Raises ConfigError.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in _public_fields(cls)}
    for key in data:
        if key not in fields:
            raise ConfigError(f"unknown key {_join(where, key)}{nearest(key, list(fields))}")
    values = {key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()}
    for name, f in fields.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"missing key {_join(where, name)}")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from error


def _public_fields(cls: Any) -> list[dataclasses.Field[Any]]:
    """The fields a configuration may set: not those that code fills in."""
    return [f for f in dataclasses.fields(cls) if f.init and not f.metadata.get("internal")]


def plain(value: Any) -> Any:
    """Return a dataclass as dictionaries and lists that `build` reads back; members of unions keep their `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value))
        return {f.name: _plain_field(hints[f.name], getattr(value, f.name)) for f in _public_fields(type(value))}
    return list(value) if isinstance(value, tuple) else value


def _plain_field(hint: Any, value: Any) -> Any:
    tag = {"kind": type(value).__name__} if type(value) in _choices(hint) else {}
    converted = plain(value)
    return {**tag, **converted} if tag else converted


def _choices(hint: Any) -> tuple[Any, ...]:
    """The dataclasses among the members of a union of several (none if there is at most one)."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ()
    classes = tuple(m for m in members if dataclasses.is_dataclass(m))
    return classes if len(classes) > 1 else ()


def _convert(hint: Any, value: Any, where: str) -> Any:
    if value is None and type(None) in get_args(hint):
        return None
    if choices := _choices(hint):
        return _convert_choice(choices, value, where)
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):  # X | None
        (inner,) = (a for a in args if a is not type(None))
        return _convert(inner, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(
                f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}{nearest(value, args)}"
            )
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}")
        return build(hint, value, where)  # type: ignore[arg-type]
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value


def _convert_choice(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    by_name = {c.__name__: c for c in choices}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ConfigError(f"{where} must be a table with a kind, one of {', '.join(by_name)}; got {value!r}")
    kind = value["kind"]
    if not isinstance(kind, str) or kind not in by_name:
        raise ConfigError(f"{where}.kind must be one of {', '.join(by_name)}, got {kind!r}{nearest(kind, by_name)}")
    return build(by_name[kind], {k: v for k, v in value.items() if k != "kind"}, where)


def nearest(word: Any, candidates: Any) -> str:
    """Return a hint at the candidate most like a word, empty if none is."""
    match = difflib.get_close_matches(str(word), [str(c) for c in candidates], n=1)
    return f" (did you mean {match[0]}?)" if match else ""


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
