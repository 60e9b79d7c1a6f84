"""A Sphinx extension that converts this project's docstrings, plain text with `names`, to reStructuredText."""

import dataclasses
import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

from packsaddle.options.describe import comments

_CODE = re.compile(r"(`[^`\n]+`)")
_NAME = re.compile(r"[A-Za-z_][\w.]*(\(\))?")
_ARGUMENTS = re.compile(r"    (\w+(?:, \w+)*): (.*)")


def to_rst(lines: list[str]) -> list[str]:
    """Convert a docstring's lines to reStructuredText.

    A `name` becomes a reference, other text in backticks becomes code, symbols are escaped, and an empty line is added
    before each list. Examples (>>>) remain unchanged.
    """
    result: list[str] = []
    example = False  # True: the line belongs to an example
    for line in _with_fields(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>> "))
        if example:
            result.append(line)
            continue
        if line.lstrip().startswith("- ") and result and result[-1].strip() and not _in_list(result):
            result.append("")
        result.append(line if line.startswith(":") else _escaped(line))
    return result


def _with_fields(lines: list[str]) -> list[str]:
    """Replace the section "Args:" by fields of reStructuredText. Each of several names on one line gets the text."""
    result: list[str] = []
    arguments: list[tuple[list[str], list[str]]] = []
    inside = False
    for line in [*lines, ""]:
        inside = line.strip() == "Args:" or (inside and line.startswith("    "))
        if not inside:
            result += [
                f for names, text in arguments for name in names for f in (f":param {name}: {text[0]}", *text[1:])
            ]
            arguments = []
            result.append(line)
        elif found := _ARGUMENTS.fullmatch(line):
            arguments.append((found[1].split(", "), [_escaped(found[2])]))
        elif arguments:
            arguments[-1][1].append(line)
    return result


def _in_list(before: list[str]) -> bool:
    """Return True if the last paragraph of the lines so far began as a list item."""
    for line in reversed(before):
        if not line.strip():
            return False
        if line.lstrip().startswith("- "):
            return True
    return False


def _escaped(line: str) -> str:
    return "".join(map(_piece, _CODE.split(line)))


def _piece(piece: str) -> str:
    if _CODE.fullmatch(piece):
        inside = piece[1:-1]
        return f":py:obj:`{inside}`" if _NAME.fullmatch(inside) else f"``{inside}``"
    return re.sub(r"([\\*|]|_(?!\w))", r"\\\1", piece)


def _on_docstring(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = to_rst(lines)
    if what == "class" and dataclasses.is_dataclass(thing):
        shown = {
            n: text for n, text in comments(thing).items() if text and not n.startswith("_") and "noqa" not in text
        }
        lines += [f":ivar {n}: {_escaped(text)}" for n, text in shown.items()]


def _on_signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """Remove a dataclass's internal fields, which users must not set, from its signature. Sphinx calls this."""
    if what == "class" and dataclasses.is_dataclass(thing) and signature:
        for field in dataclasses.fields(thing):
            if field.metadata.get("internal"):
                signature = re.sub(rf",? {field.name}: [^=]* = \(\)", "", signature)
        signature = signature.replace("<factory>", "...")  # Sphinx cannot parse "<factory>"
    return signature, returns


def _on_missing(app: Sphinx, env: Any, node: Any, content: nodes.Element) -> nodes.Element | None:
    """Resolve a reference that Sphinx did not find, as it is or as an attribute of packsaddle.

    Docstrings of inner modules use the names that users import from packsaddle itself. A name that is not documented,
    such as an argument, becomes code; an inner type becomes text.
    """
    domain, name = env.get_domain("py"), f"packsaddle.{node.get('reftarget')}"
    if node.get("reftype") == "obj" and name in domain.objects:
        found: nodes.Element = domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, content)
        return found
    inner = node.get("refdomain") == "py" and node.get("reftarget", "").startswith("packsaddle.")
    return content if node.get("reftype") == "obj" or inner else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register this extension's handlers of Sphinx's events. Sphinx calls this."""
    app.connect("autodoc-process-docstring", _on_docstring)
    app.connect("autodoc-process-signature", _on_signature)
    app.connect("missing-reference", _on_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
