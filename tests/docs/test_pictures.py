"""The pictures of ideas: pages show those that the script draws, readable on a phone, with their sources' numbers."""

import csv
import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sphinx")
ROOT = Path(__file__).parents[2]

from lab.docs import charts, pictures  # noqa: E402
from lab.docs.shades import images  # noqa: E402

SIZE = re.compile(r"<text style=\"[^\"]*?\b([\d.]+)px")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The text of each file that the script writes, by name."""
    out = tmp_path_factory.mktemp("pictures")
    pictures.write(out)
    return {path.name: path.read_text() for path in out.iterdir()}


def words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def shown() -> set[str]:
    """The files that pages show."""
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    found = {page: re.findall(r'(?:src|srcset)="([^"]+\.svg)"', page.read_text()) for page in pages}
    files = [(page.parent / path).resolve() for page, paths in found.items() for path in paths]
    assert all(path.exists() for path in files)
    return {path.name for path in files if path.parent == pictures.OUT}


def test_pages_show_what_the_script_draws(drawn: dict[str, str]) -> None:
    assert shown() == set(drawn)


def test_committed_pictures_are_the_drawn_ones(drawn: dict[str, str]) -> None:
    """By their words: matplotlib's versions differ in how they write lines."""
    committed = {path.name: path.read_text() for path in pictures.OUT.iterdir()}
    assert {name: words(svg) for name, svg in committed.items()} == {name: words(svg) for name, svg in drawn.items()}


def test_letters_are_text_of_eleven_pixels_on_a_phone(drawn: dict[str, str]) -> None:
    phone = 390 - 2 * 16  # pixels between the margins
    for svg in drawn.values():
        width = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
        assert width
        sizes = [float(size) * phone / float(width[1]) for size in SIZE.findall(svg)]
        assert len(sizes) >= len(words(svg)) > 5
        assert min(sizes) >= 11
        assert len(svg.encode()) < 60_000


def test_algorithm_has_the_numbers_of_the_reference(drawn: dict[str, str]) -> None:
    source = (ROOT / "examples" / "reference.py").read_text().partition("    trace = ")[2]
    lines = {int(n) for comment in re.findall(r"# lines? (\d+(?: and \d+)?)", source) for n in comment.split(" and ")}
    assert {int(word) for word in words(drawn["algorithm-light.svg"]) if word.isdigit()} == lines | {14}


def test_bytes_are_those_of_the_race(drawn: dict[str, str]) -> None:
    """The table of the race's card, and the rows of the Muon benchmark, have the same network and workers."""
    card = (ROOT / "experiments" / "race" / "README.md").read_text()
    with (ROOT / "experiments" / "muon" / "gpt-w2.csv").open(newline="") as file:
        muon = {row["method"]: float(row["kB_a_step"]) for row in csv.DictReader(file)}
    expected = [
        re.search(rf"^\| `{re.escape(name)}` \| 600 \| 3 \| [^|]* \| ([\d,.]+) \|", card, re.MULTILINE)
        for name in ("ddp", "QSGD(127) hook=bucket")
    ]
    texts = words(drawn["wire-light.svg"])
    assert all(match and f"{float(match[1].replace(',', '')):,.0f} kB" in texts for match in expected)
    assert f"{muon['Muon, dense']:,.0f} kB" in texts
    assert f"{muon['Muon, local 8, Sign']:,.0f} kB" in texts


def test_certified_intervals_hold_and_decide() -> None:
    """The Hessian of the picture's loss is diagonal: its smallest eigenvalue is -0.5 at 0, and 0.05 at the minimum."""
    point = torch.zeros(pictures.D, dtype=torch.float64)
    at_saddle = pictures.certificate(point)
    point[0] = 0.5**0.5
    at_minimum = pictures.certificate(point)
    assert at_saddle.lambda_min_lower <= -0.5 <= at_saddle.lambda_min_upper < at_saddle.threshold
    smallest = 0.05 + 0.95 / (pictures.D - 1)
    assert at_minimum.threshold < at_minimum.lambda_min_lower <= smallest <= at_minimum.lambda_min_upper


def test_both_images_of_a_picture() -> None:
    html = '<picture>\n<source srcset="a-dark.svg">\n<img alt="two\nwords" src="a-light.svg">\n</picture>'
    light, dark = images(html)
    assert (light["uri"], light["classes"]) == ("a-light.svg", ["only-light"])
    assert (dark["uri"], dark["classes"]) == ("a-dark.svg", ["only-dark"])
    assert light["alt"] == dark["alt"] == "two words"
    with pytest.raises(ValueError, match="must have src, srcset and alt"):
        images('<picture><img src="a-light.svg"></picture>')


def test_a_dark_chart_has_light_text_and_no_background(tmp_path: Path) -> None:
    """Black becomes light, dark colors become lighter, white goes; shapes stay."""
    svg = '<svg width="9"><path d="M 1 2" style="fill: #ffffff"/><path style="stroke: #1f77b4; fill: #000000"/></svg>'
    light, dark = (file.read_text() for file in charts.write(svg, tmp_path / "a"))
    assert light == svg.replace("#ffffff", "none")
    assert dark.startswith('<svg fill="#e6edf3" width="9">')
    stroke, fill = re.findall("#[0-9a-f]{6}", dark)[1:]
    assert fill == "#ffffff"
    assert sum(bytes.fromhex(stroke[1:])) > 1.3 * sum(bytes.fromhex("1f77b4"))
    assert re.sub("#[0-9a-f]{6}", "", dark).replace(' fill=""', "") == re.sub("#[0-9a-f]{6}", "", light)
