"""The budget of the code: the code lines of the library, of the lab and of the tests. They exclude docstrings, comments
and blank lines, so that these may be long.

Who needs more removes as much elsewhere, or raises a number here and says why in the commit.
"""

import ast
import io
import tokenize
from pathlib import Path

import packsaddle

ROOT = Path(packsaddle.__file__).parent
REPOSITORY = Path(__file__).parents[1]
# The most code lines in all.
LIBRARY, LAB, TESTS = 16_620, 7_000, 22_000
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


def test_the_whole() -> None:
    lab = [REPOSITORY / name for name in ("lab", "experiments", "docs")]
    for most, roots in ((LIBRARY, [ROOT]), (LAB, lab), (TESTS, [REPOSITORY / "tests"])):
        assert sum(code_lines(path.read_text()) for root in roots for path in root.rglob("*.py")) <= most, roots


def test_code_lines_are_no_docstrings_comments_or_blanks() -> None:
    source = '''"""A module.

Two lines."""

# a comment
def f() -> str:  # one line
    """A docstring."""

    return """two
lines"""
'''
    assert code_lines(source) == 3
