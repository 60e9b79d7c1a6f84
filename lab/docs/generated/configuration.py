"""The keys of a configuration, from the dataclasses of lab.runs.config and their comments."""

import dataclasses
import json
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lab.docs.generated import table
from lab.runs.config import Config
from packsaddle.options.describe import descriptions
from packsaddle.options.schema import choices, settable

_NAMES = {int: "integer", float: "number", str: "text", bool: "true or false"}


def markdown() -> str:
    """Return a table of the keys at the top, and a section with a table for each TOML table."""
    hints = get_type_hints(Config)
    tables = {f.name: hints[f.name] for f in settable(Config) if _classes(hints[f.name])}
    plain = [f for f in settable(Config) if f.name not in tables]
    parts = ["### Top level", _keys(Config, plain)]
    for name, hint in tables.items():
        (first, *others) = _classes(hint)
        about = descriptions(Config).get(name) or (first.__doc__ or "").partition("\n")[0]
        optional = " Optional." if type(None) in get_args(hint) else ""
        parts += [f"### `[{name}]`", _sentence(about) + optional]
        if name == "back":
            parts.append("The keys of `[compressor]`.")
        elif others:
            parts.append(_union([first, *others]))
        else:
            parts += _table(name, first)
    return "\n\n".join(parts)


def _table(name: str, cls: type) -> list[str]:
    """Return the paragraphs on a TOML table: a table of its keys, and a section for each TOML table inside it."""
    hints = get_type_hints(cls)
    inner = [f for f in settable(cls) if _classes(hints[f.name])]
    parts = [_keys(cls, [f for f in settable(cls) if f not in inner])]
    for f in inner:
        (kind,) = _classes(hints[f.name])
        optional = " Optional." if type(None) in get_args(hints[f.name]) else ""
        scalar = f" `{name}.{f.name} = x` alone sets `{settable(kind)[0].name}`."
        about = _sentence((kind.__doc__ or "").partition("\n")[0])
        parts += [f"### `[{name}.{f.name}]`", about + optional + scalar, *_table(f"{name}.{f.name}", kind)]
    return parts


def _classes(hint: Any) -> list[type]:
    """Return the dataclasses that a key's type hint allows: several if the key `kind` selects one of them."""
    found = choices(hint) or tuple(h for h in (hint, *get_args(hint)) if dataclasses.is_dataclass(h))
    return list(found)


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."


def _keys(cls: type, fields: list[dataclasses.Field[Any]]) -> str:
    hints, said = get_type_hints(cls), descriptions(cls)
    rows = [[f"`{f.name}`", _kind(hints[f.name]), _default(f), said.get(f.name, "")] for f in fields]
    return table(["key", "value", "default", "meaning"], rows)


def _union(classes: list[type]) -> str:
    """Return a table of the keys of several classes that `kind` selects; each key names the kinds that have it."""
    kinds = ", ".join(f"`{c.__name__}`" for c in classes)
    rows = [["`kind`", kinds, "required", "all", "the class of the compressor"]]
    keys: dict[tuple[str, ...], list[str]] = {}
    for cls in classes:
        hints, said = get_type_hints(cls), descriptions(cls)
        for f in settable(cls):
            row = (f"`{f.name}`", _kind(hints[f.name]), _default(f), said.get(f.name, ""))
            keys.setdefault(row, []).append(f"`{cls.__name__}`")
    rows += [[name, kind, default, ", ".join(of), about] for (name, kind, default, about), of in keys.items()]
    return table(["key", "value", "default", "of the kinds", "meaning"], rows)


def _kind(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join(f"`{json.dumps(value)}`" for value in get_args(hint))
    if get_origin(hint) is tuple:
        return f"list of {_kind(get_args(hint)[0])}s"
    others = [h for h in get_args(hint) if h is not type(None)]
    return _kind(others[0]) if others else _NAMES[hint]


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is dataclasses.MISSING:
        return "required"
    value = list(f.default) if isinstance(f.default, tuple) else f.default
    written = json.dumps(value).replace("Infinity", "inf")  # TOML's notation of infinity
    return "none" if value in (None, [], "") else f"`{written}`"
