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


def test_every_export_is_in_the_api(site: Path) -> None:
    pages = "".join(page.read_text() for page in (site / "docs" / "api").glob("*.html"))
    for module in (packsaddle, lab.paper.proof, lab.paper.problems):
        for name in module.__all__:
            assert f'id="{module.__name__}.{name}"' in pages, f"{module.__name__}.{name}"
