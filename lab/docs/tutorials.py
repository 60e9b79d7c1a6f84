"""The pages of docs/tutorials: each shows a script of examples/tutorials, its printed output and its pictures.

make tutorials, or: python -m lab.docs.tutorials [--out FOLDER] [--prose] [SCRIPT ...]

A script is in the percent format: `# %% [markdown]` begins a cell of prose in comments, `# %%` a cell of code. The
output of a cell that begins with `# %% tags=["varies"]` differs between machines, so tests do not compare it. Links in
the prose are relative to the repository's root. An SVG is named by its file name, wherever the script saves it, and
becomes a picture for light and dark pages.
"""

import argparse
import io
import os
import re
import sysconfig
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from lab import charts

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted((ROOT / "examples" / "tutorials").glob("[0-9]*.py"))
PAGES = ROOT / "docs" / "tutorials"


@dataclass(frozen=True)
class Cell:
    """A cell of a script. `text` has its lines without the heading, and `line` is the number of the first of them."""

    is_prose: bool
    varies: bool
    text: str
    line: int


def cells(script: Path) -> list[Cell]:
    """Return the cells of a script. Raises ValueError if there is text before the first cell."""
    before, *parts = re.split(r"^(# %%.*)\n", script.read_text(), flags=re.MULTILINE)
    if before.strip():
        raise ValueError(f"{script.name} must begin with a cell")
    found, line = [], before.count("\n") + 1
    for heading, body in zip(parts[::2], parts[1::2], strict=True):
        is_prose = "[markdown]" in heading
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE) if is_prose else body
        found.append(Cell(is_prose, '"varies"' in heading, text.strip(), line + 1))
        line += 1 + body.count("\n")
    return found


def run(script: Path, folder: Path) -> list[str]:
    """Run the code of a script in a folder, and return the printed output of each cell of code."""
    names: dict[str, object] = {"__name__": "__main__", "__file__": str(script)}
    outputs, home = [], Path.cwd()
    os.chdir(folder)
    try:
        for cell in cells(script):
            if cell.is_prose:
                continue
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile("\n" * (cell.line - 1) + cell.text, script, "exec"), names)
            outputs.append("\n".join(line.rstrip() for line in printed.getvalue().strip("\n").splitlines()))
    finally:
        os.chdir(home)
    return outputs


def page(script: Path, outputs: Sequence[str]) -> str:
    """Return a script's page as Markdown. `outputs` has the printed output of each cell of code."""
    blocks, printed = [], iter(outputs)
    for cell in cells(script):
        if cell.is_prose:
            blocks.append(_linked(cell.text))
            continue
        blocks.append(f"```python\n{cell.text}\n```")
        if output := next(printed):
            blocks.append(f"```text\n{output}\n```")
    name = script.relative_to(ROOT)
    blocks.append(f"*Written by `make tutorials` from\n[{name}](../../{name}).*")
    return "\n\n".join(blocks) + "\n"


def printed_in(script: Path, text: str) -> list[str]:
    """Return the output of each cell of code as it stands in the `text` of the script's page; "" if there is none."""
    found = re.findall(r"^```python\n.*?\n```\n(?:\n```text\n(.*?)\n```\n)?", text, re.MULTILINE | re.DOTALL)
    expected = sum(not cell.is_prose for cell in cells(script))
    if len(found) != expected:
        raise ValueError(f"the page of {script.name} must have {expected} cells of code, and has {len(found)}")
    return found


def pictures(script: Path) -> list[str]:
    """Return the names of the pictures in a script's prose."""
    return [name for cell in cells(script) if cell.is_prose for name in re.findall(r"!\[[^]]*\]\((\S+)\)", cell.text)]


def _linked(prose: str) -> str:
    """Return prose with its links, which are relative to the repository's root, made relative to docs/tutorials."""
    prose = re.sub(r"!\[([^]]*)\]\((\S+)\.svg\)", lambda found: charts.picture(found[1], found[2]), prose)
    prose = re.sub(r"\]\(docs/", "](../", prose)
    return re.sub(r"\]\((examples|experiments|lab|README)", r"](../../\1", prose)


def write(script: Path, out: Path) -> None:
    """Run a script, and write its page and pictures into a folder."""
    with tempfile.TemporaryDirectory(prefix="tutorial-") as folder:
        outputs = run(script, Path(folder))
        for name in pictures(script):
            (drawn,) = Path(folder).rglob(name)
            charts.write(drawn.read_text(), out / drawn.stem)
    (out / f"{script.stem}.md").write_text(page(script, outputs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", type=Path, default=SCRIPTS)
    parser.add_argument("--out", type=Path, default=PAGES)
    parser.add_argument("--prose", action="store_true", help="run nothing: keep what the pages say was printed")
    arguments = parser.parse_args()
    os.environ["PATH"] = (
        f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"  # scripts call installed commands
    )
    out = arguments.out.resolve()
    for script in arguments.scripts:
        if arguments.prose:
            old = out / f"{script.stem}.md"
            old.write_text(page(script.resolve(), printed_in(script, old.read_text())))
        else:
            write(script.resolve(), out)


if __name__ == "__main__":
    main()
