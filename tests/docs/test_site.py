"""The documentation site: it builds without a warning, every page can be reached, and every export is described."""

import re
import subprocess
from pathlib import Path

import pytest
from forked_python import environment, python

import lab.paper.problems
import lab.paper.proof
import packsaddle

ROOT = Path(__file__).parents[2]
pytest.importorskip("sphinx")
pytestmark = [pytest.mark.nightly, pytest.mark.xdist_group("site")]  # built once; see also test_pages


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    build = [python(), "-m", "sphinx", "-W", "-n", "--keep-going", "-q", "-d", str(out / "trees")]
    done = subprocess.run(
        [*build, "-c", "docs", ".", str(out / "html")],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


def test_every_page_is_reached_from_the_index(site: Path) -> None:
    index = site / "docs" / "index.html"
    linked = {index} | {
        (index.parent / href).resolve() for href in re.findall(r'href="([^"#:]+\.html)', index.read_text())
    }
    written = [ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    written += [*ROOT.glob("experiments/*/*.md"), *ROOT.glob("lab/bench/*.md")]
    for page in written:
        assert site / page.relative_to(ROOT).with_suffix(".html") in linked, page


def test_the_sidebar_is_short(site: Path) -> None:
    """Theory is one entry; the pages of a guide are below it."""
    sidebar = (site / "docs" / "index.html").read_text().partition('<div class="sidebar-tree">')[2]
    entries = sidebar.count('<li class="toctree-l1')
    assert 10 < entries <= 20


def test_the_front_page_leads_to_the_index(site: Path) -> None:
    assert 'url=docs/index.html"' in (site / "index.html").read_text()


def test_generated_tables_are_on_their_pages(site: Path) -> None:
    """That they are whole, test_generated says; here, that they became tables and headings."""
    for page, id, word in (
        ("configuration", "local", "keep_unsent"),
        ("command-line", "python-m-lab-race-link", "--contenders"),
        ("compressors", "compressors-and-exchanges", "SketchTopK(ratio, k, rows"),
        ("metrics", "summary-json", "exchange_reason"),
    ):
        text = (site / "docs" / f"{page}.html").read_text()
        section = text.partition(f'<section id="{id}">')[2]
        assert re.search(rf"<td><p><code[^>]*>(<[^>]*>|[^<])*?{re.escape(word[:11])}", section), page
        assert "| ---" not in text


def test_every_export_is_in_the_api(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "docs" / "api").glob("*.html"))
    for module in (packsaddle, lab.paper.proof, lab.paper.problems):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in pages, f"{module.__name__}.{name}"


def test_names_in_docstrings_are_links_or_code(site: Path) -> None:
    page = (site / "docs" / "api" / "optimizer.html").read_text()
    assert 'href="escape.html#packsaddle.Ramp"' in page
    assert "`" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
