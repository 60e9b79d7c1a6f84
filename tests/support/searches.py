"""Arguments of `certify` with the fields of its `Search` among them, as tests write them."""

from dataclasses import fields
from typing import Any

from packsaddle.curvature import Search

_FIELDS = {f.name for f in fields(Search)}


def arguments(**given: Any) -> dict[str, Any]:
    """Return the arguments, with a Search of those that are its fields."""
    others = {name: value for name, value in given.items() if name not in _FIELDS}
    return {**others, "search": Search(**{name: given[name] for name in given.keys() & _FIELDS})}
