"""The pages of docs/api and the objects that they document."""

import importlib
import re
from pathlib import Path
from typing import Any

from packsaddle.compressors.registry import CLASSES

PAGES = sorted(page for page in (Path(__file__).parents[2] / "docs" / "api").glob("*.md") if page.name != "index.md")


def text_of(page: Path) -> str:
    """The text of a page, with the directives that it generates for the compressors."""
    generated = "".join(f".. autoclass:: packsaddle.{name}\n" for name in CLASSES)
    return page.read_text().replace("```{generated-compressor-classes}\n", generated)


def documented(page: Path) -> list[str]:
    """The dotted names on a page."""
    return re.findall(r"\.\. auto(?:function|class|module):: ([\w.]+)", text_of(page))


def found(name: str) -> Any:
    """The object of a dotted name; modules are imported where a package does not have them."""
    parts = name.split(".")
    thing = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part):
            importlib.import_module(".".join(parts[:i]))
        thing = getattr(thing, part)
    return thing
