"""What a run wrote down, checked as it is read back: JSON of the types that reports and certificates rely on.

Fields that are not known are let through, so that a folder of another version is read as far as it goes.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal

from packsaddle.certificate import Verdict
from packsaddle.schema import ConfigError
from packsaddle.wording import shown

Kind = Literal["number", "count", "text", "verdict", "finite number"]
Fields = tuple[dict[str, Kind], dict[str, Kind]]  # those that must be there, those that may be, or be null
_TYPES: dict[Kind, Any] = {
    "number": int | float,
    "count": int,
    "text": str,
    "verdict": str,
    "finite number": int | float,
}

_CONFIG: Fields = ({}, {"label": "text", "seed": "count", "plateau": "finite number"})
_METRICS: Fields = (
    {"step": "count", "epoch": "finite number", "loss": "number", "seconds": "finite number"},
    dict.fromkeys(("sent", "received", "payload", "grad_norm", "test_loss", "test_accuracy", "mu"), "number"),
)
_SUMMARY: Fields = (
    {},
    {
        **dict.fromkeys(("final_loss", "test_loss", "test_accuracy", "compression", "seconds"), "number"),
        "steps": "count",
    },
)
_CERTIFICATES: Fields = (
    {"verdict": "verdict", "step": "count", "epoch": "finite number"},
    dict.fromkeys(("loss", "grad_norm", "lambda_min_lower", "lambda_min_upper", "threshold"), "number"),
)
_FIELDS: dict[str, Fields] = {
    "config.json": _CONFIG,
    "environment.json": ({}, {"packsaddle": "text"}),
    "summary.json": _SUMMARY,
    "metrics.jsonl": _METRICS,
    "certificates.jsonl": _CERTIFICATES,
}


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in one file of a run folder. Raises ConfigError that names the file and the field."""
    return _checked(_parsed(_text(path), path.name), path.name, path.name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON lines in a file of a run folder, none if there is no such file; the last one may be cut off, as
    by a kill in the middle of it. Raises ConfigError that names the line and the field."""
    lines = _text(path).splitlines() if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        where = f"{path.name}, line {number}"
        try:
            content = _parsed(line, where)
        except ConfigError:
            if number == len(lines):
                break
            raise
        found.append(_checked(content, path.name, where))
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from None


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid JSON: lists or objects are nested too deeply") from None


def _checked(content: Any, name: str, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"{where} must be a JSON object, got {shown(content)}")
    needed, possible = _FIELDS[name]
    for field, kind in {**needed, **possible}.items():
        if field not in content:
            if field in needed:
                raise ConfigError(f"{where} lacks {field}")
            continue
        if content[field] is None and field in possible and field != "seed":
            continue
        if not _is(kind, content[field]):
            raise ConfigError(f"{where}: {field} must be a {kind}, got {shown(content[field])}")
    if name == "certificates.jsonl":
        bounds = [content.setdefault(f"lambda_min_{end}", None) is None for end in ("lower", "upper")]
        content.setdefault("threshold", None)
        content.setdefault("loss", None)
        if bounds[0] != bounds[1]:
            raise ConfigError(f"{where}: lambda_min_lower and lambda_min_upper must be both numbers or both null")
    return content


def _is(kind: Kind, value: Any) -> bool:
    if isinstance(value, int) and (isinstance(value, bool) or not -(2**63) <= value < 2**63):
        return False
    if kind == "verdict":
        return value in list(Verdict)
    return isinstance(value, _TYPES[kind]) and (kind != "finite number" or math.isfinite(value))
