"""Plain prose: no banned phrase and no long line."""

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
