"""A configuration as a commented TOML file: values from a Config, words from the comments beside its fields."""

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin, get_type_hints

from packsaddle.compress import TopK
from packsaddle.config import CertifyConfig, Config, EscapeConfig
from packsaddle.schema import choices, settable

# What stands, commented out, where a configuration has nothing.
_EXAMPLES: dict[str, Any] = {
    "storm": 0.1,
    "test_every": 1.0,
    "plateau": 0.1,
    "data.limit": 1000,
    "noise.lower_from": 10.0,
    "noise.lower_until": 14.0,
    "compressor.k": 1000,
    "compressor.block_size": 16,
    "compressor.values": "bfloat16",
    "back": TopK(0.05),
    "back.k": 1000,
    "back.values": "bfloat16",
    "escape": EscapeConfig(interval=5000, radius=5.0),
    "certify": CertifyConfig(epsilon=2e-3),
    "certify.hessian_lipschitz": 1e-3,
    "certify.every": 1.0,
    "certify.last_epsilon": 1e-2,
}
_COLUMN, _WIDTH = 28, 120


def template(config: Config, heading: str) -> str:
    """Return TOML that loads as `config`, with every key: those at their defaults, or without a value, commented out.

    The values of the latter are examples. `heading` is what the file begins with.
    """
    hints, fields = get_type_hints(Config), settable(Config)
    tables = [f for f in fields if any(map(dataclasses.is_dataclass, (hints[f.name], *get_args(hints[f.name]))))]
    lines = [f"# {line}".rstrip() for line in heading.splitlines()] + [""]
    for f in fields:
        if f not in tables:
            lines += _key(config, f, hints[f.name], f.name)
    for f in tables:
        lines += ["", *_table(getattr(config, f.name), f.name, hints[f.name])]
    return "\n".join(lines) + "\n"


def _table(value: Any, name: str, hint: Any) -> Iterator[str]:
    off = "# " if value is None else ""
    value = _EXAMPLES[name] if value is None else value
    cls, kinds = type(value), [c.__name__ for c in choices(hint)]
    about = comments(Config).get(name) or (inspect.getdoc(cls) or "").partition("\n")[0].removesuffix(".")
    yield from _line(f"{off}[{name}]", about)
    if kinds:
        yield from _line(f"{off}kind = {json.dumps(cls.__name__)}", f"one of {', '.join(kinds)}")
    for f in settable(cls):
        yield from _key(value, f, get_type_hints(cls)[f.name], f"{name}.{f.name}", off)


def _key(owner: Any, f: dataclasses.Field[Any], hint: Any, name: str, off: str = "") -> Iterator[str]:
    value, required = getattr(owner, f.name), f.default is dataclasses.MISSING
    about = [comments(type(owner)).get(f.name, "")] + ["needed"] * (required and bool(off))
    if options := [c for h in (hint, *get_args(hint)) if get_origin(h) is Literal for c in get_args(h)]:
        about.insert(0, f"one of {', '.join(options)}")
    if value is not None and value != f.default and f.default not in (None, (), dataclasses.MISSING):
        about.append(f"by default {_toml(f.default)}")
    off = "# " if value is None or value == f.default else off
    shown = _EXAMPLES[name] if value is None else value
    yield from _line(f"{off}{f.name} = {_toml(shown)}", "; ".join(filter(None, about)))


def _line(statement: str, about: str) -> Iterator[str]:
    """A statement with a comment, which goes on below where it is long."""
    at = max(_COLUMN, len(statement) + 1)
    first, *others = textwrap.wrap(about, _WIDTH - at - 2, break_on_hyphens=False) or [""]
    yield f"{statement:<{at}}# {first}" if first else statement
    yield from (f"{'':<{_COLUMN}}# {other}" for other in others)


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value) if isinstance(value, str | bool) else repr(value)


def comments(cls: type) -> dict[str, str]:
    """Return the comment of each field of a dataclass: on its line, or on the lines above it."""
    found = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines = source.splitlines()
        (tree,) = ast.parse(source).body
        assert isinstance(tree, ast.ClassDef)
        for node in tree.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                above, at = "", node.lineno - 2
                while lines[at].startswith("    # "):
                    above, at = f"{lines[at].strip(' #')} {above}", at - 1
                beside = lines[(node.end_lineno or 0) - 1][node.end_col_offset or 0 :].strip(" #")
                found[node.target.id] = f"{above}{beside}".strip()
    return found
