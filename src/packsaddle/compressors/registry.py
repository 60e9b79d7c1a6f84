"""All compressor classes by name, and functions that parse a compressor from text or describe it as text or a dict."""

import ast
import re
from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from packsaddle.compressors import kinds
from packsaddle.compressors.base import Compressor

_PERCENT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)%(?=\s*[,)])")

CLASSES: Mapping[str, Any] = {name: kind for name, kind in vars(kinds).items() if isinstance(kind, type)}


def variants(kind: Any, ratio: float) -> list[Compressor]:
    """Return a compressor of class `kind` for each variant in the class's `summary`, with this `ratio` if the class has
    a ratio."""
    has_ratio = any(f.name == "ratio" for f in fields(kind))
    return [kind(**{"ratio": ratio} | given) if has_ratio else kind(**given) for given in kind.summary.variants]


def compressors(ratio: float) -> list[Compressor]:
    """Return one object of each compressor class, or several for a class with variants. Compressors with a ratio get
    this `ratio`. Raises ValueError unless `ratio` is in (0, 1]."""
    return [compressor for kind in CLASSES.values() for compressor in variants(kind, ratio)]


def parse_compressor(text: str) -> Compressor:
    """Parse a constructor call in `text`, such as TopK(1/32), TopK(1%) or Sign. Arguments are literals or quotients.
    Raises ValueError if the text is not such a call or an argument is invalid."""
    written = _PERCENT.sub(r"\1/100", text)
    try:
        call = ast.parse(written if "(" in written else f"{written}()", mode="eval").body
        return _called(call)
    except (SyntaxError, AssertionError):
        raise ValueError(f"a compressor must look like RandomK(0.01), got {text!r}") from None
    except TypeError as error:
        raise ValueError(str(error)) from None


def _called(call: ast.expr) -> Compressor:
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    if call.func.id not in CLASSES:
        near = get_close_matches(call.func.id, CLASSES, 1)
        hint = f" (did you mean {near[0]}?)" if near else f"; there is {', '.join(CLASSES)}"
        raise ValueError(f"no compressor {call.func.id}{hint}")
    named = {k.arg or "": _argument(k.value) for k in call.keywords}
    compressor: Compressor = CLASSES[call.func.id](*map(_argument, call.args), **named)
    return compressor


def _argument(node: ast.expr) -> Any:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        over, under = _argument(node.left), _argument(node.right)
        assert all(isinstance(part, int | float) for part in (over, under))
        assert under != 0
        return over / under
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise AssertionError from None


def describe(compressor: Compressor) -> str:
    """Return the constructor call of a compressor as text. Arguments that are equal to their defaults are omitted. If
    the compressor is not a dataclass, all arguments are omitted."""
    given = [(f, getattr(compressor, f.name)) for f in _fields(compressor)]
    shown = [f"{f.name}={_described(value)}" for f, value in given if value != f.default]
    return f"{type(compressor).__name__}({', '.join(shown)})"


def _fields(compressor: Compressor) -> "list[Field[Any]]":
    if not is_dataclass(compressor):
        return []
    return [f for f in fields(compressor) if not f.metadata.get("internal")]


def _described(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)


def identify(compressor: Compressor) -> dict[str, Any]:
    """Return a dict that identifies a compressor in a checkpoint. It contains the name of the compressor's class as
    "kind", and the compressor's fields, as plain types."""
    values = {f.name: _plain(getattr(compressor, f.name)) for f in _fields(compressor)}
    return {"kind": type(compressor).__name__, **values}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value)  # also converts numpy.float64
    return value if isinstance(value, str | int | None) else repr(value)
