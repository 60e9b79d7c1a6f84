"""Collection of the options that must be equal on all workers, from the fields of option classes."""

import dataclasses
from typing import Any


class Option:
    """Base class of frozen dataclasses whose fields are options. An option must be equal on all workers, unless its
    field is declared as `own(...)`."""


def own(default: Any) -> Any:
    """Return a dataclass field with the default value `default`. The field may differ between workers, and cannot be
    set in a configuration."""
    return dataclasses.field(default=default, metadata={"own": True, "internal": True})


def agreement(options: Any, where: str = "") -> dict[str, object]:
    """Return the values of the fields of `options` that must be equal on all workers, as a dict. Fields of nested
    option classes are included.

    A key is the path of a field, i.e. the names of the fields from `options` down to this field, joined by dots.
    `where` is put before each key. As an exception, the key of a field inside a field `compression` begins with the
    field's own name.
    """
    found: dict[str, object] = {}
    for f in dataclasses.fields(options):
        value, name = getattr(options, f.name), f"{where}{f.name}"
        if not f.metadata.get("own"):
            inside = "" if f.name == "compression" else f"{name}."
            found |= agreement(value, inside) if isinstance(value, Option) else {name: value}
    return found
