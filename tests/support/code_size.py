"""Sizes of files in code lines, which exclude docstrings, comments and blank lines, so that these may be long.

A statement counts each line that it spans.
"""

import ast
import io
import tokenize
from collections import Counter
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_NO_CODE = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING),
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Return the number of code lines of a module."""
    documents = set[int]()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if first is not None and ast.get_docstring(node, clean=False) is not None:
                documents.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    used = set[int]()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE:
            used.update(range(token.start[0], token.end[0] + 1))
    return len(used - documents)


@cache
def sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Return {folder: (number of files, number of code lines)} for each folder in `root`.

    The key "" is for the files directly in `root`.
    """
    files, lines = Counter[str](), Counter[str]()
    for path in root.rglob("*.py"):
        folder, *rest = path.relative_to(root).parts
        room = folder if rest else ""
        files[room] += 1
        lines[room] += code_lines(path.read_text())
    return {room: (files[room], lines[room]) for room in sorted(files)}


def total(roots: Iterable[Path]) -> tuple[int, int]:
    """Return the number of files and the number of code lines in all given folders together."""
    found = [size for root in roots for size in sizes(root).values()]
    return sum(n for n, _ in found), sum(lines for _, lines in found)


def members(source: str, name: str) -> tuple[int, int]:
    """Return the number of functions of the class `name` in a module, and of attributes that its `__init__` sets."""
    classes = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ClassDef) and n.name == name]
    functions = [n for n in classes[0].body if isinstance(n, ast.FunctionDef)]
    stores = [n for f in functions if f.name == "__init__" for n in ast.walk(f) if isinstance(n, ast.Attribute)]
    set_there = {n.attr for n in stores if isinstance(n.ctx, ast.Store) and ast.unparse(n.value) == "self"}
    return len(functions), len(set_there)
