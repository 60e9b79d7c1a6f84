"""Construction of frozen dataclasses from dictionaries, such as those read from TOML.

Error messages name the invalid key and the most similar valid key. Since tomllib does not report the positions of keys,
`line_of` searches the text for the line of a key.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from packsaddle.errors import ConfigError
from packsaddle.messages import shortened, shown
from packsaddle.options.numerals import real, whole

T = TypeVar("T")
Place = tuple[str | int, ...]  # path to a value: keys of tables and indices of lists, the outermost first
_FEW = 5  # maximum number of keys of a table in a message, and maximum number of suggested keys


def build(cls: type[T], data: Mapping[str, Any], where: Place = (), root: Any = None, *, saved: bool = False) -> T:
    """Construct the dataclass `cls` from `data`: return cls(**data). Every key and value is first checked against the
    annotations of the dataclass. Raises ConfigError if a key is unknown or missing, or if a value is invalid.

    Args:
        cls: The dataclass. A field whose type is a union of dataclasses needs a table with the key `kind`, the name of
            one of them.
        data: The values of the fields, by name.
        where: The path of `data` in the whole configuration, for error messages.
        root: The dataclass of the whole configuration, for error messages; by default `cls`.
        saved: True for data that `feedback.state` wrote. Fields with defaults must then be present, and numbers must
            not be text.
    """
    root = root or cls
    if not isinstance(data, Mapping):
        raise _about(where, f"{dotted(where) or 'a configuration'} must be a table, got {shown(data)}")
    hints = get_type_hints(cls)
    fields = {f.name: f for f in settable(cls)}

    # Report unknown keys before checking any value.
    for key in data:
        if key not in fields:
            place = (*where, key)
            raise _about(place, f"unknown key {dotted(place)} ({_nearest_keys(place, cls, root) or _keys_of(cls)})")
    values = {}
    for key, value in data.items():
        # If the field is a fraction, do not convert an integer to float, so that the class can reject the integer 1,
        # which may be meant as a count or as 1%.
        is_kept = fields[key].metadata.get("share") and isinstance(value, int) and not isinstance(value, bool)
        values[key] = value if is_kept else decode(hints[key], value, (*where, key), root, saved=saved)
    for name, f in fields.items():
        if (saved or is_required(f)) and name not in values:
            allowed = f", one of {_listed(get_args(hints[name]))}" if get_origin(hints[name]) is Literal else ""
            raise _about(where, f"missing key {dotted((*where, name))}{allowed}")
    try:
        return cls(**values)
    except ValueError as error:
        about = str(error).partition(" ")[0].split(".")  # most error messages begin with a field's name
        raise _about(
            (*where, *about) if _has(data, about) else where, f"{dotted(where)}: {error}" if where else str(error)
        ) from error


def _has(data: Any, path: Sequence[str]) -> bool:
    return not path or (isinstance(data, Mapping) and path[0] in data and _has(data[path[0]], path[1:]))


def _about(where: Place, message: str) -> ConfigError:
    """Return a ConfigError with the text `message`. The error's key, by which `line_of` finds the line, is the part of
    the path `where` before the first index of a list."""
    return ConfigError(message, tuple(takewhile(lambda part: isinstance(part, str), where)))  # type: ignore[arg-type]


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


def decode(hint: Any, value: Any, where: Place = (), root: Any = None, *, saved: bool = False) -> Any:
    """Convert plain data to the type `hint`. Dataclasses are constructed by `build`. Raises ConfigError if the data do
    not fit the type.

    Args:
        hint: A type annotation.
        value: The data: a plain value, or nested dictionaries and lists.
        where: The path of `value` in the whole configuration, for error messages.
        root: The dataclass of the whole configuration, for error messages.
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
            raise _about(where, f"{dotted(where)} must be a table with a kind, one of {names}; got {shown(value)}")
        kind, place = value["kind"], (*where, "kind")
        if not isinstance(kind, str) or kind not in by_name:
            near = nearest(kind, by_name)
            raise _about(place, f"{dotted(place)} must be one of {names}, got {shown(kind)}{near}")
        return build(by_name[kind], {k: v for k, v in value.items() if k != "kind"}, where, root, saved=saved)
    if origin in (Union, types.UnionType):  # the annotation is X | None
        (inner,) = (a for a in args if a is not type(None))
        return decode(inner, value, where, root, saved=saved)
    if origin is Literal:
        if value not in args:
            near = nearest(value, args)
            raise _about(where, f"{dotted(where)} must be one of {_listed(args)}, got {shown(value)}{near}")
        return value

    # Decode dictionaries, lists and dataclasses.
    if origin is dict:
        if not isinstance(value, Mapping):
            raise _about(where, f"{dotted(where)} must be a table, got {shown(value)}")
        return {key: decode(args[1], inner, (*where, key), root, saved=saved) for key, inner in value.items()}
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise _about(where, f"{dotted(where)} must be a list, got {shown(value)}")
        each = args if origin is tuple and args[1:] != (...,) else args[:1] * len(value)
        if len(each) != len(value):
            raise _about(where, f"{dotted(where)} must have {len(each)} entries, got {len(value)}")
        pairs = enumerate(zip(each, value, strict=True))
        return origin(decode(a, v, (*where, i), root, saved=saved) for i, (a, v) in pairs)
    if dataclasses.is_dataclass(hint):
        first = settable(hint)[:1]
        if not (saved or isinstance(value, Mapping)) and first and first[0].default is not dataclasses.MISSING:
            value = {first[0].name: value}
        return build(hint, value, where, root, saved=saved)  # type: ignore[arg-type]

    # Decode plain types. A bool does not count as a number.
    if not saved and hint in (int, float) and not isinstance(value, bool):
        value = _number(hint, value)
    if not isinstance(value, (float, int) if hint is float else hint) or (isinstance(value, bool) and hint is not bool):
        raise _about(where, f"{dotted(where)} must be of type {hint.__name__}, got {shown(value)}")
    # Python decodes a command-line argument that is not UTF-8 to surrogates, which are the characters in this range.
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise _about(where, f"{dotted(where)} must be UTF-8, got {value!a}")
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


def _nearest_keys(place: Place, cls: Any, root: Any) -> str:
    """Suggest valid keys for `place`, the path of an unknown key in a table of type `cls`. Returns "did you mean X?",
    where X are the valid keys with the most similar names, or "" if no name is similar enough.

    All keys of the configuration `root` are candidates. A key of another table needs a more similar name than a key of
    the unknown key's own table. It is not suggested if the own table has, for some `kind`, a key with the same name.
    """
    table, name = place[:-1], shortened(str(place[-1]))
    known = dict.fromkeys(_places(root))
    others = (other for other in known if (*table, other[-1]) not in known)

    # Score each valid key by the similarity of its name to the unknown key's name. The similarity is from 0 to 1, which
    # means equal. At least 0.6 is required for a key of the same table, as by difflib's get_close_matches.
    scores: dict[Place, float] = {}
    for other in (*((*table, f.name) for f in settable(cls)), *others):
        is_near = other[:-1] == table
        similarity = difflib.SequenceMatcher(None, str(other[-1]), name).ratio()
        if similarity >= (0.6 if is_near else 0.8):
            scores[other] = similarity + 0.2 * is_near
    best = [other for other, score in scores.items() if score == max(scores.values())]
    texts = [dotted(other) + " at the top level" * (len(other) == 1 < len(place)) for other in best[:_FEW]]
    return f"did you mean {', '.join(texts[:-1])}{' or ' * (len(texts) > 1)}{texts[-1]}?" if texts else ""


def _places(cls: Any, where: Place = ()) -> Iterator[Place]:
    """Yield the path (a tuple of keys) of each key that a configuration of the dataclass `cls` can have. Keys of nested
    tables follow the key of their table, except for tables in lists. A table with several kinds has the keys of every
    kind. `where` is put before each path."""
    hints = get_type_hints(cls)
    for f in settable(cls):
        yield (*where, f.name)
        hint = hints[f.name]
        for inner in () if get_origin(hint) is tuple else filter(dataclasses.is_dataclass, (hint, *get_args(hint))):
            yield from _places(inner, (*where, f.name))


def _keys_of(cls: Any) -> str:
    names = [f.name for f in settable(cls)]
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return f"{cls.__name__.removesuffix('Config') or 'a configuration'} takes {', '.join(names[:_FEW]) or 'none'}{more}"


def dotted(where: Place) -> str:
    """Return a path of keys as one line of text in TOML's dotted notation, such as a.b.c. Keys are quoted if
    necessary."""

    def quoted(key: str) -> str:
        return shortened(key if re.fullmatch(r"[A-Za-z0-9_*-]+", key) else json.dumps(key))

    parts = (f"[{part}]" if isinstance(part, int) else f".{quoted(str(part))}" for part in where)
    return shortened("".join(parts).removeprefix("."))


def line_of(key: Sequence[str], path: Path, text: str) -> str:
    """Return "FILE, line N", where N is the line of `key` in `text`, the TOML text of the file `path`. If the key is
    not in the text, N is the line of the innermost enclosing table that is in the text. If no such table exists, return
    "FILE".

    The line of a table is the first line that mentions the table. Since a statement may have several lines, lines are
    accumulated until tomllib can parse them together with the header of their table. The statement is then complete,
    since no beginning of a statement is valid TOML without the rest.
    """
    header, statement, start, depth, found = "", "", 1, 0, 0
    # Split at newlines only: str.splitlines would split at characters that do not end a line in TOML.
    for number, line in enumerate(text.split("\n"), 1):
        statement += line + "\n"
        try:
            table = tomllib.loads(header + statement)
        except (ValueError, RecursionError):
            continue
        while depth < len(key) and _has(table, key[: depth + 1]):
            depth, found = depth + 1, start
        header = statement if statement.lstrip().startswith("[") else header
        start, statement = number + 1, ""
    return f"{path}, line {found}" if found else str(path)


def first_difference(
    ours: Mapping[str, Any], theirs: Mapping[str, Any], where: str = ""
) -> tuple[str, Any, Any] | None:
    """Compare the nested dicts `ours` and `theirs`, and find the first key whose values differ. Returns the key in
    dotted notation, its value in `ours`, and its value in `theirs`. Returns None if all values are equal. The key
    "workers" of the outermost dict is ignored. `where` is put before the key."""
    for key in dict.fromkeys([*ours, *theirs]):
        a, b = ours.get(key), theirs.get(key)
        if a == b or (where + key) == "workers":
            continue
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            return first_difference(a, b, f"{where}{key}.")
        return where + key, a, b
    return None
