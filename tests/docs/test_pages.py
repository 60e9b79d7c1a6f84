"""Pages are in a table of contents, and their links lead to files and headings that exist.

It finds in a second what most of the site's warnings are about (test_site builds the site).
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").rglob("*.md"),
    *ROOT.glob("experiments/**/*.md"),
    *ROOT.glob("lab/bench/*.md"),
]
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def entries(page: Path) -> list[Path]:
    """Return the pages in the tables of contents of a page."""
    found = list[Path]()
    for table in re.findall(r"^```\{toctree\}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in filter(None, table.splitlines()):
            name = re.sub(r".*<(.*)>$", r"\1", line)
            found += page.parent.glob(f"{name}.md") if "*" in name else []
            found += [(page.parent / f"{name}.md").resolve()] if name[0] != ":" and "*" not in name else []
    return found


def test_every_page_is_in_a_table_of_contents() -> None:
    listed = [ROOT / "docs" / "index.md"]
    for page in listed:  # which grows
        listed += [entry for entry in entries(page) if entry not in listed]
    assert [page for page in listed if not page.exists()] == []
    wanted = {page for page in PAGES if page.is_relative_to(ROOT / "docs") or page.is_relative_to(ROOT / "experiments")}
    assert wanted - {*listed} == set()


def headings(page: Path) -> set[str]:
    """Return the names by which links find the headings of a page, as GitHub makes them."""
    found = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in found]
    return {re.sub(r"[^\w -]", "", heading).strip().replace(" ", "-") for heading in plain}


def test_links_lead_to_files_and_headings() -> None:
    wrong = list[str]()
    for page in PAGES:
        text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text()))
        assert text.count("```") == 0, page  # each block is closed
        for link in re.findall(r"\]\(([^)\s]+)\)", text):
            if ":" in link:  # of another site
                continue
            file, _, heading = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            if not target.exists() or (heading and target.suffix == ".md" and heading not in headings(target)):
                wrong.append(f"{page.relative_to(ROOT)}: {link}")
    assert wrong == []
