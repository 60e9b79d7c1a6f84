"""Plain prose: no banned phrase, no long line, each of some facts on one page only; plain docstrings in src."""

import ast
import re
import tokenize
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "examples/README.md")]
FOLDERS = ("docs", "docs/api", "docs/tutorials", "experiments/*", "lab/bench")
PAGES += [page for folder in FOLDERS for page in sorted(ROOT.glob(f"{folder}/*.md"))]
CODE = sorted((ROOT / "src").rglob("*.py"))
WIDTH = 140
# Regular expressions of phrases that earlier versions had everywhere.
BANNED = (
    r"to be had|is had|are had|takes? it for|taken for|so many|comes of|came of|what it came to|of what is to be",
    r"go on with|going on with|goes on|gone on|besides?|be told|told of|all told|under way|as ever|for ever",
    r"nobody|somebody|now and then|in the midst|next to nothing|meeting place|as it stands|watched over",
    r"by themselves alone",
)
FSTRING = getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)  # from Python 3.12 on
# A fact, by words that state it, and the one page that states it; other pages link there.
HOMES = {
    r"nft add": "docs/security.md",
    r"unpickles\s+what\s+it\s+finds": "docs/security.md",
    r"Gloo connectFullMesh failed": "docs/multi-node.md",
    r"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "docs/multi-node.md",
    r"30\s+minutes\s+for\s+gloo": "docs/multi-node.md",
    r"error\s+memory\s+would\s+keep\s+a\s+NaN": "docs/guards.md",
    r"1/64\s+of\s+the\s+largest\s+number": "docs/guards.md",
    r"16-byte\s+fingerprint": "docs/guards.md",
    r"\b2\.68\b(?! \|)": "docs/guards.md",
    r"step-STEP\.unusable": "docs/checkpoints.md",
    r"8\s+d\s+\(W\s+-\s+1\)\s+/\s+W\s+bytes": "docs/slow-links.md",
    r"too\s+small\s+to\s+forecast": "docs/slow-links.md",
    r"model\.join\(\)": "docs/ddp.md",
    r"download\.pytorch\.org/whl/cpu": "docs/start.md",
    r"38%\s+at\s+1,024": "docs/scale.md",
    r"28%\s+of\s+the\s+bytes\s+of\s+dense": "docs/compressors.md",
    r"bias\s+is\s+sent\s+every\s+1000\s+steps": "docs/departures.md",
    r"\b0\.19\.6\b": "docs/comparison.md",
    r"1\.5,\s+1\.7,\s+2\.7,\s+3,\s+4": "experiments/adamw/README.md",
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> list[str]:
    """The lines of a page, empty in place of code blocks and inline code, so that numbers of lines stay."""
    lines, fenced, code = list[str](), False, False
    for line in page.read_text().splitlines():
        fence = line.lstrip().startswith("```")
        indented = line.startswith("    ") and (code or not lines or not lines[-1].strip())
        hidden = fenced or fence or indented
        fenced ^= fence
        code = indented or (code and not line.strip())
        lines.append("" if hidden else line)
    return lines


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_banned_phrase(page: Path) -> None:
    text = "\n".join(re.sub(r"`[^`]*`", "``", line) for line in prose(page))
    phrases = "|".join((*BANNED, "at the first")).replace(" ", r"\s+")
    found = re.finditer(rf"\b(?:{phrases})\b", text, re.IGNORECASE)
    assert not [(text.count("\n", 0, m.start()) + 1, m[0]) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_begins_questions_only(page: Path) -> None:
    """A sentence whose subject is a clause with "what" is hard to read."""
    text = "\n".join("\n" if line.startswith(("|", "#")) else line for line in prose(page))
    sentences = [s.strip(" *-\n") for s in re.split(r"(?<=[.!?:])\s+|\n\s*\n|\n- ", text)]
    assert not [s for s in sentences if re.match(r"What\b", s) and not s.endswith("?")]


def docstrings(source: str) -> list[tuple[int, str]]:
    """The docstrings of a module, with the number of the line that each describes."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    return [(getattr(node, "lineno", 1), ast.get_docstring(node) or "") for node in found]


QUESTION = re.compile(r"(What|Whether|How|Which|Who|Whose|Where|When|Why)\b")


def test_docstrings_begin_with_a_noun_or_a_verb() -> None:
    found = [(name(path), line, text) for path in CODE for line, text in docstrings(path.read_text())]
    assert len(found) > 1000
    assert not [where for *where, text in found if QUESTION.match(text)]


@pytest.mark.parametrize("folder", sorted({path.parent for path in CODE}), ids=name)
def test_no_banned_phrase_in_code(folder: Path) -> None:
    """Neither in comments nor in texts, docstrings among them."""
    phrases = re.compile(r"\b(?:{})\b".format("|".join(BANNED).replace(" ", r"\s+(?:#\s+)?")))
    found = []
    for path in CODE:
        if path.parent == folder:
            tokens = tokenize.generate_tokens(StringIO(path.read_text()).readline)
            words = [t for t in tokens if t.type in (tokenize.COMMENT, tokenize.STRING, FSTRING)]
            found += [(name(path), t.start[0], m[0]) for t in words for m in phrases.finditer(t.string)]
    assert not found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_lines_are_short(page: Path) -> None:
    long = [n for n, line in enumerate(prose(page), 1) if len(line) > WIDTH and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("fact", HOMES)
def test_a_fact_is_on_one_page(fact: str) -> None:
    assert [name(page) for page in PAGES if re.search(fact, page.read_text())] == [HOMES[fact]]


def test_phrases_and_long_lines_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("x" * 141 + "\n\n    so many in code\n\nSo\nmany.\n\n- item\n\n```\nbeside\n```\n")
    assert prose(page)[2] == prose(page)[10] == ""
    assert len(prose(page)[0]) > WIDTH
    assert re.search(r"so\s+many", "\n".join(prose(page)), re.IGNORECASE)
