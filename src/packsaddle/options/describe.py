"""Descriptions of options for help texts, read from the source code: comments of dataclass fields, and "Args:" sections
of docstrings."""

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable
from functools import cache
from typing import Any, get_args, get_type_hints


def descriptions(of: type | Callable[..., Any]) -> dict[str, str]:
    """Return the description of each argument of a function, or of each field of a dataclass.

    The result is a dict from names to texts. The description of a field is read from the "Args:" section of its class's
    docstring, or else from the comment on the field. Descriptions in a class replace those in its base classes. If the
    type of a function's argument is a dataclass, the descriptions of that dataclass's fields are included.
    """
    if not isinstance(of, type):
        classes = (option_class(hint) for name, hint in get_type_hints(of).items() if name != "return")
        return {name: text for cls in classes if cls for name, text in descriptions(cls).items()} | arguments(of)
    found: dict[str, str] = {}
    for base in filter(dataclasses.is_dataclass, reversed(of.__mro__)):
        own = {**comments(base), **arguments(base)}
        found |= {name: text for name, text in own.items() if text or name not in found}
    return found


def option_class(hint: Any) -> type[Any] | None:
    """Return the first dataclass in a type annotation such as X, X | None or list[X]. Returns None if the annotation
    has no dataclass."""
    return next((h for h in (hint, *get_args(hint)) if inspect.isclass(h) and dataclasses.is_dataclass(h)), None)


def arguments(of: type | Callable[..., Any]) -> dict[str, str]:
    """Return the text of each argument in the "Args:" section of a docstring, by the argument's name. Line breaks in a
    text are replaced by spaces."""
    section = re.split(r"\n\n(?=\S)", inspect.cleandoc(of.__doc__ or "").partition("\nArgs:\n")[2])[0]
    found = {}
    for names, text in re.findall(r"^ {4}(\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
        found.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return found


@cache
def comments(cls: type) -> dict[str, str]:
    """Return the comment on each field that a dataclass itself declares, by the field's name. A comment may be on the
    field's line, on the lines above it, or in both places. Then the two comments are joined. A field without a comment
    has the text ""."""
    source = textwrap.dedent(inspect.getsource(cls))
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            # Join the comments above the field and the one on its line.
            above, at = "", node.lineno - 2
            while lines[at].startswith("    # "):
                above, at = f"{lines[at].strip(' #')} {above}", at - 1
            aside = lines[(node.end_lineno or 0) - 1][node.end_col_offset or 0 :].strip(" #")
            found[node.target.id] = f"{above}{aside}".strip()
    return found
