"""The pages of docs/api and the objects that they document."""

import importlib
import re
from pathlib import Path
from typing import Any

from packsaddle.compressors.registry import CLASSES

PAGES = sorted(page for page in (Path(__file__).parents[2] / "docs" / "api").glob("*.md") if page.name != "index.md")


def text_of(page: Path) -> str:
    """Return the text of a page, in which the directives for all compressors replace the one that generates them."""
    generated = "".join(f".. autoclass:: packsaddle.{name}\n" for name in CLASSES)
    return page.read_text().replace("```{generated-compressor-classes}\n", generated)


def documented(page: Path) -> list[str]:
    """Return the dotted names of the objects that a page documents."""
    return re.findall(r"\.\. auto(?:function|class|module):: ([\w.]+)", text_of(page))


def found(name: str) -> Any:
    """Return the object with a dotted name. Modules that are not attributes of their package are imported."""
    parts = name.split(".")
    thing = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part):
            importlib.import_module(".".join(parts[:i]))
        thing = getattr(thing, part)
    return thing
